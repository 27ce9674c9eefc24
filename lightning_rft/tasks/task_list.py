"""A list of tasks: the first are made at once, each later one from its row when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import overload

from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.rows import Rows
from lightning_rft.tasks.source import CHECKED, digest_of
from lightning_rft.tasks.task import NotATask, as_task, reach

__all__ = ["TaskList"]

_AT_ONCE = 1_000  # rows


class TaskList(Sequence[Task]):
    """Rows as tasks, with their indices as ids where they have none.

    The first 10,000 are made and checked at once: all are tasks, and no two share an id. A later one that is no task
    raises :class:`NotATask` when it is asked for.

    Raises:
        ConfigurationError: There are no rows, one of the first is no task or has the id of another, or none of them
            has a column that is named.
    """

    def __init__(self, rows: Rows, setting: str, columns: Mapping[str, str] | None = None) -> None:
        self._rows = rows
        self._columns = columns or {}
        self._made: list[Task] = []  # the first ones
        if not rows.count:
            raise ConfigurationError(f"{setting} is empty: give at least one task")
        self._made = list(self._tasks(0, min(rows.count, CHECKED)))
        position_of: dict[str, int] = {}
        for position, task in enumerate(self._made):
            first = position_of.setdefault(task.id, position)
            if first != position:
                raise ConfigurationError(
                    f"{rows.where(position)} has the id {task.id!r} of {rows.where(first)}: make ids unique, or empty"
                )
        #: Of the first ids.
        self.digest = digest_of(position_of)
        if self._columns:
            self._check_columns(setting)

    @override
    def __len__(self) -> int:
        return self._rows.count

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...

    @override
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return list(self._tasks(places.start, places.stop)) if places.step == 1 else [self[at] for at in places]
        return self._made[places] if places < len(self._made) else next(self._tasks(places, places + 1))

    @override
    def __iter__(self) -> Iterator[Task]:
        return self._tasks(0, len(self))

    def each(self) -> Iterator[Task | NotATask]:
        """All tasks, and in their places the errors of those that are none."""
        return self._each(0, len(self))

    def _tasks(self, start: int, stop: int) -> Iterator[Task]:
        for task in self._each(start, stop):
            if isinstance(task, NotATask):
                raise task
            yield task

    def _each(self, start: int, stop: int) -> Iterator[Task | NotATask]:
        yield from self._made[start:stop]
        for begin in range(max(start, len(self._made)), stop, _AT_ONCE):
            for index, row in enumerate(self._rows.read(begin, min(begin + _AT_ONCE, stop)), begin):
                try:
                    task = as_task(row, self._rows.where(index), self._columns)
                except NotATask as error:
                    yield error
                else:
                    yield task if task.id else replace(task, id=str(index))

    def _check_columns(self, setting: str) -> None:
        first = [row for row in self._rows.read(0, min(len(self), _AT_ONCE)) if isinstance(row, Mapping)]
        for field, name in self._columns.items():
            if all(reach(row, name) is None for row in first):
                names = dict.fromkeys(name for row in first for name in row)
                raise ConfigurationError(
                    f"columns={{{field!r}: {name!r}}}: the first {len(first)} rows of {setting} have no value there; "
                    f"name one of {', '.join(names) or 'its columns (rows must be mappings)'}"
                )
