"""Rank 0 without processes: the shipped dispatcher with all that it holds, and explorers that answer at once."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from typing import Any, Self

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.channel import Failure
from lightning_rft.errors import ExplorerError
from lightning_rft.experience import Experience, Group, Turn
from lightning_rft.explorer.messages import Cancel, Died, Ended, Explore, Explored, Loaded, Scored, Started
from lightning_rft.monitor.activity import Activity
from lightning_rft.run.agreement import Agreement
from lightning_rft.run.dispatcher import Dispatcher
from lightning_rft.run.error_rate import ErrorRate
from lightning_rft.run.groups import Groups
from lightning_rft.sync.order import Order
from lightning_rft.sync.schedule import Schedule
from lightning_rft.tasks.plan import TaskCursor, TaskPlan
from lightning_rft.tasks.sources import as_tasks
from lightning_rft.trainer.scoring import Scores

PERIOD = 40  # steps after which everything comes again

_SAMPLES = 2
_FAILURE = Failure(None, "ValueError: no answer")
_SCORES = Scores((1, 2), (-1.0,), 1.0, "float32")
_STARTED = Started("float32", 1, False, max_num_seqs=8)


class Explorers:
    """In the place of the pool: keeps what explorers are asked for, in order."""

    restarts = 0

    def __init__(self) -> None:
        self.up: dict[int, Started] = {}
        self.asked: deque[tuple[int, Explore]] = deque()

    def send(self, explorer: int, *messages: Any) -> None:
        for message in messages:
            if isinstance(message, Explore):
                self.asked.append((explorer, message))
            elif isinstance(message, Cancel):
                self.asked = deque(one for one in self.asked if one[1].key != message.key)


class RankZero:
    """Trains step after step; groups fail and are filtered, and explorers die, in every period alike."""

    def __init__(
        self,
        strategy: rft.SyncStrategy,
        path: str | Path,
        *,
        explorers: int = 4,
        groups: int = 2,
        keep: int | None = None,
    ) -> None:
        #: What explorers and trainer told the schedule of.
        self.events = 0
        #: Explorers of each push that began to load together.
        self.loads: list[tuple[int, ...]] = []
        self.ledger = Ledger.open(path)
        plan = TaskPlan(as_tasks([f"{number} =" for number in range(40)]), groups, 40 // groups, shuffle=True, seed=0)
        self._groups = Groups(
            self.ledger,
            TaskCursor(plan),
            rft.Buffer(group_filter=_keeps, keep=keep),
            incarnation=self.ledger.begin(),
            samples_per_task=_SAMPLES,
            min_samples=1,
            sampling=rft.Sampling(8, 1.0),
            max_staleness=strategy.max_staleness,
        )
        self._pool = Explorers()
        self._schedule = Schedule(Order(strategy, plan.size), _SAMPLES)
        self.dispatcher = Dispatcher(
            self._schedule,
            self._groups,
            self._pool,  # type: ignore[arg-type]
            ErrorRate(1.0, 2 * groups * _SAMPLES),
            Activity(()),
            Agreement(None, lambda: "float32"),
            timeouts=rft.Timeouts(),
            check_interrupt=lambda: None,
            load_label="load",
        )
        self._in_background = strategy.asynchronous
        self._to_load: deque[int] = deque()
        if self._in_background:
            self.dispatcher.load = self._load
        self._next = 0
        for _ in range(explorers):
            self._join()
        self._push()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.close()

    def step(self) -> None:
        """Trains a batch."""
        batch = self._schedule.version
        if batch % 20 == 13:
            self._die()
        self._tell(self._schedule.wanted, batch)
        while self._groups.leased is None:
            self._answer()
        self._groups.with_replay(batch)
        self.events += 1
        self.dispatcher.trained(batch)
        while self._schedule.push_pending and not self.dispatcher.push_due:
            self._answer()
        if self.dispatcher.take_push():
            self._push()
        if batch % 10 == 0:  # as for a checkpoint
            self._groups.state_dict(self._schedule.order.progress)

    def settle(self) -> None:
        """Answers all that explorers are asked for."""
        while self._pool.asked:
            self._answer()

    def sizes(self) -> Counter[str]:
        """The number of entries of everything that grows or could, by where it is."""
        found: Counter[str] = Counter()
        _measure(self.dispatcher, "", found, set())
        for table in ("groups", "experiences", "pruned"):
            found[f"table {table}"] = self.ledger._file.ask(f"SELECT count(*) FROM {table}")[0][0]
        return found

    # What explorers do

    def _join(self) -> None:
        index, self._next = self._next, self._next + 1
        self._pool.up[index] = _STARTED
        self._handle(index, _STARTED)
        for late in self.dispatcher.roster.load_alone():
            self._loaded(late)

    def _die(self) -> None:
        """The one that has been there for the longest; another one comes."""
        index = min(self._pool.up)
        del self._pool.up[index]
        self._pool.asked = deque(one for one in self._pool.asked if one[0] != index)
        self._handle(index, Died(ExplorerError("gone")))
        self._join()

    def _answer(self) -> None:
        """The group that was asked for first comes back."""
        explorer, asked = self._pool.asked.popleft()
        key, attempt, task = asked.key, asked.attempt, asked.task.id
        for _ in range(_SAMPLES):
            self._handle(explorer, Ended(asked.run, {(key, attempt): 1}))
        if (key.batch % 10, key.slot, attempt) == (7, 0, 1):
            self._handle(explorer, Explored(asked.run, key, attempt, task, (), (_FAILURE,) * _SAMPLES))
            return
        version = self.dispatcher.roster._records[explorer].loaded
        turn = Turn((1, 2, 3), (4, 5, 6, 7), (-1.0,) * 4, (version,) * 4, "stop")
        samples = tuple(Experience(task, sample, (turn,), attempt + sample / 2) for sample in range(_SAMPLES))
        self._handle(explorer, Explored(asked.run, key, attempt, task, samples))

    def _load(self, *explorers: int) -> None:
        self.loads.append(explorers)
        self._to_load += explorers

    def _loaded(self, explorer: int) -> None:
        version = self._schedule.pushed_version if self._in_background else self._schedule.version
        self.dispatcher.roster.begin_load(explorer, 0.0)
        self._handle(explorer, Loaded(version))
        self._handle(explorer, Scored(version, (-1.0,)))
        self.dispatcher.expect(version, _SCORES)  # the trainer scores last

    def _push(self) -> None:
        version = self._schedule.version
        self.loads.clear()
        if not self._in_background:
            for explorer in list(self._pool.up):
                self._loaded(explorer)
        self._tell(self._schedule.pushed, version)
        while self._to_load:
            self._loaded(self._to_load.popleft())

    def _handle(self, explorer: int, message: Any) -> None:
        self.events += 1
        self.dispatcher.handle(explorer, message)

    def _tell(self, event: Any, number: int) -> None:
        self.events += 1
        self.dispatcher.tell(event, number)


def _keeps(group: Group) -> bool:
    return (group.key.batch % 10, group.key.slot, group.experiences[0].reward) != (3, 0, 1.0)  # its first attempt


def _measure(value: Any, place: str, found: Counter[str], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (dict, list, set, frozenset, tuple, deque)):
        found[place] += len(value)
        for one in value.values() if isinstance(value, dict) else value:
            if _is_ours(one):
                _measure(one, f"{place}[]", found, seen)
    elif _is_ours(value):
        for name, held in getattr(value, "__dict__", {}).items():
            _measure(held, f"{place}.{name}", found, seen)


def _is_ours(value: Any) -> bool:
    return type(value).__module__.startswith("lightning_rft.") and not isinstance(value, tuple)
