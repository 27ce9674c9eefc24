"""Tasks of a source without a length, read when they are needed."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.rows import tidied
from lightning_rft.tasks.source import Lane, LeftOut, Source
from lightning_rft.tasks.task import NotATask, as_task

__all__ = ["TaskStream"]

_log = logging.getLogger(__name__)

_REMEMBERED = 10_000  # tasks of an iterator
_MARKED = 64  # items between two states of the source
_WAY_OUT = "give an object that begins anew with every `for`, such as a list or a class with `__iter__`"


class _Mark(NamedTuple):
    """A place to read on from: a task's position, its item's number in the source, and the source's state there."""

    position: int
    item: int
    state: Mapping[str, Any]


class TaskStream(Source, Lane):
    """Tasks in the order in which they come, and once they have come to an end from the first one again.

    It keeps those that may be asked for again. What a resumed run, or another one, asks for of earlier ones is read
    anew: from a state of the source if it has ``state_dict`` and ``load_state_dict``, and else from the first, and the
    source must give the same ones again. An iterator cannot, and its tasks are remembered until there are too many.
    What is no task is left out, and shown.
    """

    words = "a stream of tasks"

    def __init__(self, source: Iterable[Any], columns: Mapping[str, str] | None = None) -> None:
        self._source = source
        self._columns = columns
        self._table = hasattr(source, "column_names")
        self._stateful = _has_exact_state(source)
        rest = iter(source)
        self._rest = self._tasks(rest, 0) if rest is source else None  # of an iterator
        self._remembered: list[Task] | None = []
        self._not_tasks = LeftOut()
        self._shown = -1  # the last item that was looked at
        self._oldest = 0  # the first position that may be asked for
        self._marks: deque[_Mark] = deque()
        self._begin(None)

    @override
    def lane(self, shuffle: bool, seed: int) -> Lane:
        return self

    @property
    @override
    def left_out(self) -> int:
        return self._not_tasks.count

    @override
    def number(self, position: int) -> int:
        return position  # as there are no passes that could be told apart

    @override
    def at(self, position: int) -> Task:
        if position < self._first:
            self._begin(self._marks[0] if self._marks and self._marks[0].position <= position else None)
        try:
            while position >= self._first + len(self._kept):
                self._kept.append(next(self._coming))
                self._let_go()
        except BaseException:  # after which an iterator gives nothing more
            self._begin(None)
            raise
        return self._kept[position - self._first]

    @override
    def forget(self, before: int) -> None:
        self._oldest = before
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._marks[0]._asdict() if self._marks else {}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._stateful and state:
            self._begin(_Mark(**state))

    def _begin(self, mark: _Mark | None) -> None:
        self._marks.clear()
        if mark is not None:
            self._marks.append(mark)
        self._kept: deque[Task] = deque()
        self._first = 0 if mark is None else mark.position  # the position of the first task kept
        self._coming = self._passes(mark)

    def _let_go(self) -> None:
        while self._kept and self._first < self._oldest:
            self._kept.popleft()
            self._first += 1
        while len(self._marks) > 1 and self._marks[1].position <= self._oldest:
            self._marks.popleft()

    def _passes(self, mark: _Mark | None) -> Iterator[Task]:
        while True:
            task = None
            for task in self._pass(mark):
                yield task
            if task is None and mark is None:
                raise ConfigurationError(f"tasks is empty, or can be read only once: {_WAY_OUT}")
            mark = None

    def _pass(self, mark: _Mark | None) -> Iterator[Task]:
        """One pass through the source, from its first task or from a mark on."""
        if self._rest is None:
            source = self._source
            if self._stateful:
                source = copy.copy(source)  # so that the user's own is not set to any place
                if mark is not None:
                    source.load_state_dict(copy.deepcopy(mark.state))  # type: ignore[attr-defined]
            yield from self._tasks(source, 0 if mark is None else mark.item)
            return
        if self._remembered is None:
            raise ConfigurationError(
                f"tasks is an iterator, which cannot begin again, and more than {_REMEMBERED} tasks are not kept in "
                f"memory: {_WAY_OUT}"
            )
        yield from list(self._remembered)
        for task in self._rest:
            if self._remembered is not None:
                self._remembered.append(task)
                if len(self._remembered) > _REMEMBERED:
                    self._remembered = None
                    _log.warning("tasks is an iterator, so that the run ends where it does; else %s", _WAY_OUT)
            yield task

    def _tasks(self, items: Iterable[Any], first: int) -> Iterator[Task]:
        marked = None
        for index, item in enumerate(items, first):
            try:
                task = as_task(tidied(item) if self._table else item, f"tasks[{index}]", self._columns)
            except NotATask as error:
                if index > self._shown:
                    self._not_tasks.add(error)
            else:
                self._not_tasks.took()
                yield task if task.id else replace(task, id=str(index))
            self._shown = max(self._shown, index)
            if self._stateful and (marked is None or index >= marked + _MARKED):
                marked = index
                state = _plain(items.state_dict())  # type: ignore[attr-defined]
                self._marks.append(_Mark(self._first + len(self._kept), index + 1, state))


def _has_exact_state(source: Any) -> bool:
    """Whether a source can be set to where it was, and gives then what it gave before.

    One of ``datasets`` that shuffles cannot: what was in its shuffle buffer would be lost.
    """
    if not (hasattr(source, "state_dict") and hasattr(source, "load_state_dict")):
        return False
    return not hasattr(source, "column_names") or _keeps_order(getattr(source, "_ex_iterable", None))


def _keeps_order(iterable: Any) -> bool:
    if iterable is None or "Shuffled" in type(iterable).__name__:
        return False
    inner = [getattr(iterable, "ex_iterable", None), *getattr(iterable, "ex_iterables", [])]
    return all(_keeps_order(part) for part in inner if part is not None)


def _plain(value: Any) -> Any:
    """A state as JSON values."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value
