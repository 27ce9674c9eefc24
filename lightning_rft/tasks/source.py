"""What tasks are read into, and the endless sequence of them that a plan takes its tasks from."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from typing_extensions import override

from lightning_rft.experience import Task
from lightning_rft.tasks.chance import key_of, permute
from lightning_rft.tasks.task import NotATask

__all__ = [
    *("CHECKED", "Lane", "LeftOut", "Passes", "Source", "digest_of", "epoch_tasks", "first", "ids_in_words", "known"),
    *("lane_of", "lists_of"),
]

CHECKED = 10_000  # tasks of a list that are looked at before the start

_log = logging.getLogger(__name__)
_SHOWN = 10
_IN_A_ROW = 100

Order = Callable[[int, int], int]  # number of a pass, index in it -> index in the list


class Lane(ABC):
    """An endless sequence of tasks, pass after pass, in which a position can be asked for until it is forgotten."""

    #: Tasks of a pass; None where no pass is as long as another.
    length: int | None = None
    #: What tasks there are, and in what order, for the comparison with a checkpoint.
    words: str
    order: str = ""

    @property
    def left_out(self) -> int:
        """What it has left out by itself, since it is no task."""
        return 0

    @abstractmethod
    def number(self, position: int) -> int:
        """The pass that a position belongs to; no task comes twice in one."""

    @abstractmethod
    def at(self, position: int) -> Task:
        """The task at a position; NotATask if there is none to be made of what is there."""

    def forget(self, before: int) -> None:
        """Lets go of what is before a position, which nobody asks for any more."""

    def learn(self, position: int, rewards: Sequence[float]) -> None:
        """Takes in the rewards of the group that answered a position's task."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed lane needs to go on from the first position that is not forgotten, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""


class Source(ABC):
    """Tasks that are more than a list."""

    #: The lists in it, as far as it has any.
    lists: Sequence[Sequence[Task]] = ()
    #: Tasks of an epoch, where nothing else is said; None if there is no end.
    epoch: int | None = None

    @abstractmethod
    def lane(self, shuffle: bool, seed: int) -> Lane:
        """A sequence of the tasks."""


class Passes(Lane):
    """Passes through a list, each with an order of its own."""

    def __init__(self, tasks: Sequence[Task], of: Order, order: str) -> None:
        self._tasks = tasks
        self._of = of
        self.length = len(tasks)
        self.words = ids_in_words(tasks)
        self.order = order

    @override
    def number(self, position: int) -> int:
        return position // len(self._tasks)

    @override
    def at(self, position: int) -> Task:
        return self._tasks[self._of(*divmod(position, len(self._tasks)))]


def lane_of(tasks: Sequence[Task] | Source, shuffle: bool, seed: int) -> Lane:
    """A sequence of tasks; with ``shuffle``, each pass through a list has its own order, drawn from seed and number."""
    if not isinstance(tasks, Sequence):
        return tasks.lane(shuffle, seed)
    count = len(tasks)
    if not shuffle:
        return Passes(tasks, _own_order, "")
    return Passes(tasks, lambda number, index: permute(index, count, key_of("order", seed, number)), "permuted")


def _own_order(number: int, index: int) -> int:
    return index


def lists_of(tasks: Sequence[Task] | Source) -> Sequence[Sequence[Task]]:
    """The lists that tasks consist of; none of a stream."""
    return [tasks] if isinstance(tasks, Sequence) else tasks.lists


def first(tasks: Sequence[Task] | Source) -> Iterator[Task]:
    """The tasks that are checked before the start."""
    return chain.from_iterable(islice(some, CHECKED) for some in lists_of(tasks))


def known(*many: Sequence[Task] | Source) -> list[Task]:
    """All tasks, if there are few enough to look at each before the start; else none."""
    lists = list(chain(*map(lists_of, many)))
    endless = any(isinstance(tasks, Source) and tasks.epoch is None for tasks in many)
    return [] if endless or sum(map(len, lists)) > CHECKED else list(chain(*lists))


def epoch_tasks(tasks: Sequence[Task] | Source) -> int:
    """Tasks of an epoch, where nothing else is said."""
    count = len(tasks) if isinstance(tasks, Sequence) else tasks.epoch
    assert count is not None, "checked when it was read"
    return count


def ids_in_words(tasks: Sequence[Task]) -> str:
    """How many tasks there are, and a digest of the ids of the first of them."""
    found: str | None = getattr(tasks, "digest", None)
    return f"{len(tasks)} tasks with ids of digest {found or digest_of(task.id for task in tasks[:CHECKED])}"


def digest_of(ids: Iterable[str]) -> str:
    """A digest of some ids in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ids:
        digest.update(json.dumps(name).encode())
    return digest.hexdigest()


class LeftOut:
    """Counts and shows what is left out since it is no task; raises when there is hardly anything else."""

    def __init__(self) -> None:
        self.count = 0
        self._in_a_row = 0

    def add(self, error: NotATask) -> None:
        """Counts one; raises the error if it is the hundredth in a row."""
        self.count += 1
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            raise error
        if self.count <= _SHOWN:
            _log.warning("left out: %s", error)
        elif self.count % 1000 == 0:
            _log.warning("left out %d so far; the last: %s", self.count, error)

    def took(self) -> None:
        """Notes that a task was found."""
        self._in_a_row = 0
