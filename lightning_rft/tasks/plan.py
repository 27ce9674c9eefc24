"""The order of tasks, and the task that each group of the schedule answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import GroupKey, Task
from lightning_rft.tasks.chance import draw
from lightning_rft.tasks.source import Lane, LeftOut, Source, lane_of
from lightning_rft.tasks.task import NotATask

__all__ = ["TaskCursor", "TaskPlan"]


@dataclass(frozen=True, eq=False)
class TaskPlan:
    """The order of the tasks, pass after pass, and how many of them each batch takes.

    It is the same on every machine, in every process and after every resume. An epoch is one pass through the tasks,
    or with ``goes_on`` a number of batches, and the next one goes on where it ended.

    Example:
        >>> from lightning_rft.tasks.sources import as_tasks
        >>> plan = TaskPlan(as_tasks(["a", "b", "c"]), 2, batches_per_epoch=2, shuffle=False, seed=0)
        >>> [plan.size(batch) for batch in range(4)]
        [2, 1, 2, 1]
        >>> number, task = plan.at(5)
        >>> number, task.prompt
        (1, 'c')
    """

    tasks: Sequence[Task] | Source = field(repr=False)
    tasks_per_step: int
    #: Batches of each epoch that are used; limits leave out the rest, which with ``shuffle`` varies between epochs.
    batches_per_epoch: int
    #: Whether each pass has its own order, drawn from ``seed`` and its number; a stream has its own in any case.
    shuffle: bool
    seed: int
    first_batch: int = 0
    first_epoch: int = 0
    goes_on: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.tasks, Sequence) and not self.tasks:
            raise ConfigurationError("tasks is empty: give at least one task")
        if self.tasks_per_step < 1:
            raise ConfigurationError(f"tasks_per_step is {self.tasks_per_step}: set at least 1")
        count = self.lane.length
        if count is None or self.goes_on:
            return
        whole = self.batches(count, self.tasks_per_step)
        if not 1 <= self.batches_per_epoch <= whole:
            raise ConfigurationError(
                f"batches_per_epoch is {self.batches_per_epoch}: {count} tasks, {self.tasks_per_step} a "
                f"step, make {whole}; set 1 to {whole}"
            )

    @staticmethod
    def batches(n_tasks: int, tasks_per_step: int) -> int:
        """Batches that hold all tasks once; the last may be short."""
        return -(-n_tasks // tasks_per_step)

    @cached_property
    def lane(self) -> Lane:
        """The tasks in their order, without end."""
        return lane_of(self.tasks, self.shuffle, self.seed)

    def size(self, batch: int) -> int:
        """Groups in a batch: ``tasks_per_step``, or fewer in the last one of a whole epoch."""
        if batch < self.first_batch:
            raise ScheduleError(f"batch {batch} is not planned: the plan starts at batch {self.first_batch}")
        if self.goes_on:
            return self.tasks_per_step
        before = (batch - self.first_batch) % self.batches_per_epoch * self.tasks_per_step
        return min(self.tasks_per_step, self._used - before)

    def at(self, position: int) -> tuple[int, Task]:
        """Number of the pass, and task, at a position from 0 of the stream of all tasks, without what limits drop.

        A stream has no passes that could be told apart, so there each task has a number of its own.
        """
        place = self.place(position)
        number = self.lane.number(place) if self.goes_on else self.first_epoch + position // self._used
        return number, self.lane.at(place)

    def place(self, position: int) -> int:
        """The position in the lane, which also has what limits drop and what is before the first epoch."""
        if self.goes_on:
            return self.first_epoch * self._epoch + position
        number, index = divmod(position, self._used)
        return (self.first_epoch + number) * (self.lane.length or 0) + index

    def forget(self, before: int) -> None:
        """Lets go of what is before a position, which nobody asks for any more."""
        if self.goes_on:  # else the first tasks come again
            self.lane.forget(self.place(before))

    @property
    def _epoch(self) -> int:
        """Tasks of the batches of an epoch."""
        return self.batches_per_epoch * self.tasks_per_step

    @property
    def _used(self) -> int:
        """Tasks of an epoch that does not go on."""
        return min(self._epoch, self.lane.length or self._epoch)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that a resumed run may not change, as JSON values: name -> value."""
        return {
            # first, since other settings follow from the number of tasks
            "tasks": self.lane.words,
            "tasks_per_step": self.tasks_per_step,
            "batches_per_epoch": self.batches_per_epoch,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "goes_on": self.goes_on,
            "order": self.lane.order,
        }


class TaskCursor:
    """Assigns a task to each group, and to a group whose task failed for good the next task of the stream.

    Groups take tasks from the stream of :meth:`TaskPlan.at` strictly by key. A replacement takes the next one too, so
    all later groups shift by one, and still each task comes once a pass. A ``state`` of other settings is refused,
    because tasks would be skipped or repeated; a group that is not planned, or done, is a :class:`ScheduleError`.

    Example:
        >>> from lightning_rft.tasks.sources import as_tasks
        >>> cursor = TaskCursor(TaskPlan(as_tasks(["a", "b", "c"]), 2, 2, shuffle=False, seed=0))
        >>> cursor.task(GroupKey(0, 1)).prompt
        'b'
        >>> cursor.replace(GroupKey(0, 1))
        >>> cursor.task(GroupKey(0, 1)).prompt, cursor.task(GroupKey(1, 0)).prompt, cursor.epoch(GroupKey(1, 0))
        ('c', 'a', 1)
    """

    def __init__(self, plan: TaskPlan, state: Mapping[str, Any] | None = None) -> None:
        #: The plan in use: with a state, its first batch and epoch are the state's.
        self.plan = plan
        self._next = GroupKey(plan.first_batch, 0)  # the first key that has no position yet
        self._position = 0  # the first position that no key has had yet
        self._positions: dict[GroupKey, int] = {}  # of keys that are not done
        self._read: dict[GroupKey, tuple[int, Task]] = {}  # what is at these positions, once it was asked for
        self._left_out = LeftOut()
        self._learned: dict[int, list[float]] = {}  # positions -> rewards that the curriculum does not know of yet
        if state is not None:
            _check_unchanged(plan.fingerprint, state)
            self.plan = replace(plan, first_batch=state["first_batch"], first_epoch=state["first_epoch"])
            self.plan.lane.load_state_dict(state.get("lane", {}))
            self._next, self._position = GroupKey(*state["next"]), state["position"]
            self._positions = {GroupKey(batch, slot): position for batch, slot, position in state["positions"]}
            self._learned = {position: rewards for position, rewards in state.get("learned", ())}
        self._forget()

    @property
    def left_out(self) -> int:
        """How often something was left out since it is no task."""
        return self._left_out.count + self.plan.lane.left_out

    def task(self, key: GroupKey) -> Task:
        """The task that a group answers."""
        return self._at(key)[1]

    def epoch(self, key: GroupKey) -> int:
        """Number of the pass that a group's task belongs to; after replacements it may be later than its batch's."""
        return self._at(key)[0]

    def sample_seed(self, key: GroupKey, sample: int) -> int:
        """Seed of one sample of a group, 0 to 2**31 - 1, drawn from run seed, pass, task id and ``sample``.

        It does not depend on the batch: a sample is repeated wherever the schedule puts its task in the pass.
        """
        epoch, task = self._at(key)
        return draw("sample", self.plan.seed, epoch, task.id, sample) & 0x7FFFFFFF

    def in_order(self, keys: Iterable[GroupKey]) -> list[GroupKey]:
        """Groups by the order of their tasks: which group got which replacement depends on who came back first."""
        return sorted(keys, key=self._position_of)

    def learn(self, key: GroupKey, rewards: Sequence[float]) -> None:
        """Takes in the rewards of a group's samples, for a curriculum."""
        self._learned[self._positions[key]] = list(rewards)

    def follow(self) -> None:
        """Has the curriculum follow what was learned: after a step, not when groups happen to come back."""
        for position, rewards in sorted(self._learned.items()):
            self.plan.lane.learn(self.plan.place(position), rewards)
        self._learned.clear()
        self._forget()

    def replace(self, key: GroupKey) -> None:
        """Gives a group the next task of the stream for good."""
        self._assign(key)
        self._take(key)
        self._forget()

    def done(self, key: GroupKey) -> None:
        """Forgets a group, whose task is not asked for again."""
        if self._positions.pop(key, None) is None:
            raise ScheduleError(f"group {tuple(key)} is done, but it has no task (any more)")
        self._read.pop(key, None)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The state for a resumed run, as JSON values, with one entry for each group that is not done."""
        return {
            **self.plan.fingerprint,
            "first_batch": self.plan.first_batch,
            "first_epoch": self.plan.first_epoch,
            "next": list(self._next),
            "position": self._position,
            "positions": [[*key, position] for key, position in sorted(self._positions.items())],
            "learned": [[position, rewards] for position, rewards in sorted(self._learned.items())],
            "lane": self.plan.lane.state_dict(),
        }

    def _at(self, key: GroupKey) -> tuple[int, Task]:
        position = self._position_of(key)
        if key not in self._read:  # of a checkpoint
            self._read[key] = self.plan.at(position)
        return self._read[key]

    def _position_of(self, key: GroupKey) -> int:
        self._assign(key)
        return self._positions[key]

    def _assign(self, key: GroupKey) -> None:
        """Assigns positions to all groups up to this one that have none yet."""
        if key in self._positions:
            return
        size = self.plan.size(key.batch)
        if not 0 <= key.slot < size:
            raise ScheduleError(f"group {tuple(key)} is not planned: batch {key.batch} has {size} groups")
        if key < self._next:
            raise ScheduleError(f"group {tuple(key)} is done, and its task forgotten")
        while self._next <= key:
            batch, slot = self._next
            self._take(self._next)
            self._next = GroupKey(batch, slot + 1) if slot + 1 < self.plan.size(batch) else GroupKey(batch + 1, 0)

    def _take(self, key: GroupKey) -> None:
        """Gives a group the next position that has a task."""
        position = self._position
        while True:
            try:
                self._read[key] = self.plan.at(position)
                break
            except NotATask as error:
                self._left_out.add(error)
                position += 1
        self._left_out.took()
        self._positions[key] = position
        self._position = position + 1

    def _forget(self) -> None:
        self.plan.forget(min((*self._positions.values(), *self._learned), default=self._position))


def _check_unchanged(now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    # of a checkpoint that does not know them
    drawn = saved["shuffle"] and "digest" in saved["tasks"]  # a stream has its own order
    saved = {"goes_on": False, "order": "sorted by random numbers" if drawn else "", **saved}
    for name, value in now.items():
        if value != saved[name]:
            hints = {
                "batches_per_epoch": " (from TaskSet(steps_per_epoch=...) and limit_train_batches)",
                "goes_on": " (true with TaskSet(steps_per_epoch=...))",
                "order": " (of curriculum=..., and of the version of lightning_rft)",
            }
            hint = hints.get(name, "")
            raise ConfigurationError(
                f"{name}{hint} is {value!r}, but {saved[name]!r} in the checkpoint: tasks would be skipped or repeated."
                " Set it as it was, or start a new run without ckpt_path"
            )
