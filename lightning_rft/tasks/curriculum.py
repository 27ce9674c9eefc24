"""Orders of a list's tasks that follow how hard they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.chance import draw, key_of, permute
from lightning_rft.tasks.source import Lane, Passes, Source, ids_in_words
from lightning_rft.tasks.task import NotATask, reach
from lightning_rft.tasks.task_list import TaskList

__all__ = ["ByDifficulty", "ByPassRate"]


@dataclass(frozen=True)
class ByDifficulty:
    """Each pass goes from easy tasks to hard ones; those that are equally hard come in random order.

    Every task is read once before the start.

    Args:
        key: Key of :attr:`Task.metadata`, in which dots lead into mappings, or a function of a task; gives a number
            that is higher for a harder task.
        levels: Values of ``key`` that are no numbers, from easy to hard, such as ``["easy", "hard"]``.

    Example::

        tasks = TaskSet("tasks.jsonl", curriculum=ByDifficulty("level"))
    """

    key: str | Callable[[Task], float]
    levels: list[str] | None = None

    def read(self, tasks: TaskList) -> Source:
        """Sorts the tasks; ConfigurationError for one of which it is not known how hard it is."""
        keys = np.fromiter((self._difficulty(task) for task in tasks.each()), np.float64, len(tasks))
        return _Ranked(tasks, keys, self.key if isinstance(self.key, str) else "a function")

    def _difficulty(self, task: Task | NotATask) -> float:
        if isinstance(task, NotATask):  # which is left out when it comes
            return np.inf
        value = reach(task.metadata, self.key) if isinstance(self.key, str) else self.key(task)
        if self.levels is not None and value in self.levels:
            return self.levels.index(value)
        if self.levels is None and hasattr(value, "__float__") and value == value:
            return float(value)
        raise ConfigurationError(
            f"ByDifficulty: task {task.id!r} has the difficulty {value!r}: "
            + ("give a number, or name the values with levels=[...]" if self.levels is None else "add it to levels")
        )


class _Ranked(Source):
    """Tasks sorted by a key."""

    def __init__(self, tasks: TaskList, keys: np.ndarray[Any, np.dtype[np.float64]], name: str) -> None:
        self.lists = (tasks,)
        self.epoch = len(tasks)
        self._tasks = tasks
        self._sorted = np.argsort(keys, kind="stable")
        ordered = keys[self._sorted]
        # where tasks of another key begin, and the end
        self._blocks = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
        self._name = name

    @override
    def lane(self, shuffle: bool, seed: int) -> Lane:
        def order(number: int, index: int) -> int:
            block = int(np.searchsorted(self._blocks, index, side="right"))
            start, stop = int(self._blocks[block - 1]), int(self._blocks[block])
            within = index - start
            if shuffle:
                within = permute(within, stop - start, key_of("order", seed, number, start))
            return int(self._sorted[start + within])

        digest = hashlib.blake2b(self._sorted.astype("<i8").tobytes(), digest_size=8).hexdigest()
        return Passes(self._tasks, order, f"by {self._name}, of digest {digest}{', permuted' * shuffle}")


@dataclass(frozen=True)
class ByPassRate:
    """The next task is one whose pass rate so far is nearest to a target; each task still comes once per pass.

    A task that was never answered counts as on target. The rates are those of the run: of what was trained or filtered
    by the last step. The next epoch goes on where the last one ended.

    Args:
        target: Pass rate to be near to, 0 to 1.
        pass_threshold: Reward from which a sample counts as passed.

    Raises:
        ConfigurationError: ``target`` is not from 0 to 1.

    Example::

        tasks = TaskSet("tasks.jsonl", curriculum=ByPassRate(target=0.5))
    """

    target: float = 0.5
    pass_threshold: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.target <= 1:
            raise ConfigurationError(f"ByPassRate(target={self.target}) must be from 0 to 1")

    def read(self, tasks: TaskList) -> Source:
        """Makes ready to choose among the tasks."""
        return _Rated(tasks, self)


class _Rated(Source):
    """Tasks whose order follows their pass rates."""

    def __init__(self, tasks: TaskList, settings: ByPassRate) -> None:
        self.lists = (tasks,)
        self.epoch = len(tasks)
        self._tasks = tasks
        self._settings = settings

    @override
    def lane(self, shuffle: bool, seed: int) -> Lane:
        return _ChosenTasks(self._tasks, self._settings, seed)


class _ChosenTasks(Lane):
    """Passes in which each next task is chosen when it is asked for; what was chosen is part of the state."""

    def __init__(self, tasks: TaskList, settings: ByPassRate, seed: int) -> None:
        self._tasks = tasks
        self._settings = settings
        self._seed = seed
        self._next: int | None = None  # the first position for which nothing is chosen
        self._chosen: dict[int, int] = {}  # of positions that may be asked for
        self._taken = np.zeros(len(tasks), bool)  # in the pass of the next position
        self._passed = np.zeros(len(tasks), np.int64)  # samples so far
        self._samples = np.zeros(len(tasks), np.int64)
        self.words = ids_in_words(tasks)
        self.order = f"pass rate near {settings.target}, passed from {settings.pass_threshold}"

    @override
    def number(self, position: int) -> int:
        return position // len(self._tasks)

    @override
    def at(self, position: int) -> Task:
        if self._next is None:
            self._next = position  # where the run begins
        while self._next <= position:
            self._chosen[self._next] = self._choose(self._next)
            self._next += 1
        return self._tasks[self._chosen[position]]

    @override
    def forget(self, before: int) -> None:
        for position in [position for position in self._chosen if position < before]:
            del self._chosen[position]

    @override
    def learn(self, position: int, rewards: Sequence[float]) -> None:
        index = self._chosen[position]
        self._passed[index] += sum(reward >= self._settings.pass_threshold for reward in rewards)
        self._samples[index] += len(rewards)

    @override
    def state_dict(self) -> dict[str, Any]:
        seen = np.flatnonzero(self._samples)
        results = np.stack([seen, self._passed[seen], self._samples[seen]], axis=1)
        return {
            "next": self._next,
            "chosen": [list(pair) for pair in self._chosen.items()],
            "taken": np.flatnonzero(self._taken).tolist(),
            "results": results.tolist(),
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]
        self._chosen = dict(map(tuple, state["chosen"]))
        self._taken[state["taken"]] = True
        for index, passed, samples in state["results"]:
            self._passed[index], self._samples[index] = passed, samples

    def _choose(self, position: int) -> int:
        if position % len(self._tasks) == 0:
            self._taken[:] = False
        rates = self._passed / np.maximum(self._samples, 1)
        away = np.where(self._samples > 0, np.abs(rates - self._settings.target), 0.0)
        away[self._taken] = np.inf
        nearest = np.flatnonzero(away == away.min())
        index = int(nearest[draw("choice", self._seed, position) % len(nearest)])
        self._taken[index] = True
        return index
