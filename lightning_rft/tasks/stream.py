"""Tasks of a source without a length, read when they are needed."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.sources import Tasks, as_task, rows

__all__ = ["TaskStream"]

_log = logging.getLogger(__name__)


class TaskStream:
    """Tasks in the order in which they come, and once they have come to an end from the first one again.

    They are kept, and a resumed run reads them anew from the first: the source must give the same ones again. What is
    no task is left out, and shown.
    """

    def __init__(self, source: Tasks) -> None:
        self._rest = enumerate(rows(source, "tasks"))
        self._came: Counter[str] = Counter()  # how often, by id
        self._read: list[tuple[int, Task]] = []
        self._length: int | None = None  # once it is known

    def at(self, position: int) -> tuple[int, Task]:
        """How often the task at a position came before, and the task.

        Raises :class:`ConfigurationError` if the source has no task at all.
        """
        while position >= len(self._read):
            task = self._next() if self._length is None else self._read[len(self._read) - self._length][1]
            if task is not None:
                self._read.append((self._came[task.id], task))
                self._came[task.id] += 1
        return self._read[position]

    def _next(self) -> Task | None:
        position, item = next(self._rest, (None, None))
        if position is None:
            self._length = len(self._read)
            if not self._length:
                raise ConfigurationError("tasks is empty: give at least one task")
            return None
        try:
            task = as_task(item, f"tasks[{position}]")
        except ConfigurationError as error:
            _log.warning("left out: %s", error)
            return None
        return task if task.id else replace(task, id=str(position))
