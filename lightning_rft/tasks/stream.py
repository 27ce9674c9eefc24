"""Tasks of a source without a length, read when they are needed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.sources import Tasks, as_task, rows

__all__ = ["TaskStream"]

_log = logging.getLogger(__name__)

_REMEMBERED = 10_000  # tasks of an iterator
_WAY_OUT = "give an object that begins anew with every `for`, such as a list or a class with `__iter__`"


class TaskStream:
    """Tasks in the order in which they come, and once they have come to an end from the first one again.

    It keeps those that may be asked for again. What a resumed run, or another one, asks for of earlier ones is read
    anew from the first: the source must give the same ones again. An iterator cannot, and its tasks are remembered
    until there are too many. What is no task is left out, and shown.
    """

    def __init__(self, source: Tasks) -> None:
        self._source = rows(source, "tasks")
        rest = iter(self._source)
        self._rest = self._tasks(rest) if rest is self._source else None  # of an iterator
        self._remembered: list[Task] | None = []
        self._shown = -1  # the last item that was looked at
        self._oldest = 0  # the first position that may be asked for
        self._begin()

    def at(self, position: int) -> Task:
        """The task at a position; ConfigurationError if there is none, or it cannot be read again."""
        if position < self._first:
            self._begin()
        try:
            while position >= self._first + len(self._kept):
                self._kept.append(next(self._coming))
                self._let_go()
        except BaseException:  # after which an iterator gives nothing more
            self._begin()
            raise
        return self._kept[position - self._first]

    def forget(self, before: int) -> None:
        """Lets go of the tasks before a position, which nobody asks for any more."""
        self._oldest = before
        self._let_go()

    def _begin(self) -> None:
        self._coming = self._passes()
        self._kept: deque[Task] = deque()
        self._first = 0  # the position of the first task kept

    def _let_go(self) -> None:
        while self._kept and self._first < self._oldest:
            self._kept.popleft()
            self._first += 1

    def _passes(self) -> Iterator[Task]:
        while True:
            task = None
            for task in self._pass():
                yield task
            if task is None:
                raise ConfigurationError(f"tasks is empty, or can be read only once: {_WAY_OUT}")

    def _pass(self) -> Iterator[Task]:
        """One pass through the source, from its first task on."""
        if self._rest is None:
            yield from self._tasks(self._source)
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

    def _tasks(self, items: Iterable[Any]) -> Iterator[Task]:
        for index, item in enumerate(items):
            try:
                task = as_task(item, f"tasks[{index}]")
            except ConfigurationError as error:
                if index > self._shown:
                    _log.warning("left out: %s", error)
            else:
                yield task if task.id else replace(task, id=str(index))
            self._shown = max(self._shown, index)
