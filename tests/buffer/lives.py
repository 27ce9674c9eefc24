"""Whole simulated runs on a ledger, in which tasks fail, are filtered and dropped, and the process dies."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.experience import Experience, Group, GroupKey, Progress, Turn
from tests.buffer.groups import query

BATCHES, SLOTS, STALENESS = 6, 2, 2


@dataclass
class Run:
    """A trainer with a stream of tasks 0, 1, ..., all that a checkpoint holds."""

    version: int = 0
    tasks: dict[GroupKey, int] = field(default_factory=dict)
    next_key: int = 0
    next_task: int = 0
    trained: set[GroupKey] = field(default_factory=set)
    ended: list[tuple[int, State]] = field(default_factory=list)
    incarnation: int = 0

    def task(self, key: GroupKey) -> int:
        while self.next_key <= key.batch * SLOTS + key.slot:
            self.tasks[GroupKey(*divmod(self.next_key, SLOTS))] = self.next_task
            self.next_key, self.next_task = self.next_key + 1, self.next_task + 1
        return self.tasks[key]

    def end(self, key: GroupKey, state: State) -> None:
        self.ended.append((self.tasks[key], state))
        self.tasks[key], self.next_task = self.next_task, self.next_task + 1

    @property
    def progress(self) -> Progress:
        past = {GroupKey(batch, slot) for batch in range(self.version) for slot in range(SLOTS)}
        return Progress(
            self.version,
            frozenset(past - self.trained),
            frozenset(key for key in self.trained if key.batch >= self.version),
        )


class Simulation:
    """An asynchronous run in which tasks fail, are filtered and dropped, and the process dies."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.run = Run(incarnation=ledger.begin())
        self.checkpoints: list[Run] = [copy.deepcopy(self.run)]
        self.again: list[GroupKey] = []
        self.issued: list[GroupKey] = []
        self.ready: dict[GroupKey, int] = {}
        self.first = 0

    def issue(self, _: int) -> None:
        """Replacements first, then by key."""
        if self.again:
            key = min(self.again)
            self.again.remove(key)
        else:
            while self.key(self.first) in self.run.trained or self.key(self.first) in self.ready:
                self.first += 1
            key = self.key(self.first)
            if key.batch > self.run.version + STALENESS:
                return
            self.first += 1
        self.ledger.issue(key, str(self.run.task(key)), 0, 0)
        self.issued.append(key)

    def key(self, index: int) -> GroupKey:
        return GroupKey(*divmod(index, SLOTS))

    def answer(self, choice: int) -> None:
        if self.issued:
            key = self.issued.pop(choice % len(self.issued))
            oldest = max(0, self.run.version - choice % (STALENESS + 1))
            turn = Turn((1,), (2, 3), (-0.5, -0.5), (oldest, self.run.version), "stop")
            task = str(self.run.task(key))
            self.ledger.ready(Group(key, task, (Experience(task, 0, (turn,), 1.0),)))
            self.ready[key] = oldest

    def fail(self, choice: int) -> None:
        if self.issued:
            key = self.issued.pop(choice % len(self.issued))
            self.ledger.failed(key, "boom", self.run.version)
            self.run.end(key, State.FAILED)
            self.again.append(key)

    def filter(self, choice: int) -> None:
        if self.issued and choice % 2:
            self.end(self.issued.pop(choice % len(self.issued)))
        elif self.ready:
            key = sorted(self.ready)[choice % len(self.ready)]
            del self.ready[key]
            self.end(key)

    def end(self, key: GroupKey) -> None:
        self.ledger.filtered(key, self.run.version)
        self.run.end(key, State.FILTERED)
        self.again.append(key)

    def drop(self, choice: int) -> None:
        if self.ready:
            key = sorted(self.ready)[choice % len(self.ready)]
            del self.ready[key]
            self.ledger.dropped(key)
            self.again.append(key)

    def train(self, choice: int) -> None:
        for key, oldest in list(self.ready.items()):
            if oldest < self.run.version - STALENESS:
                self.drop(sorted(self.ready).index(key))
        keys = sorted(self.ready)[choice % 2 :][:SLOTS]
        if len(keys) < SLOTS or self.run.version == BATCHES:
            return
        self.ledger.lease(keys)
        self.ledger.trained(self.run.version)
        for key in keys:
            del self.ready[key]
            self.run.trained.add(key)
            self.run.ended.append((self.run.tasks[key], State.TRAINED))
        self.run.version += 1

    def work(self, choice: int) -> None:
        """As a run goes when nothing happens."""
        for event in (self.issue, self.issue, self.answer, self.answer, self.train):
            event(choice)

    def save(self, _: int) -> None:
        if self.checkpoints[-1].version < self.run.version:
            self.checkpoints.append(copy.deepcopy(self.run))

    def die(self, choice: int) -> None:
        """And go on from one of the checkpoints of this life."""
        lost = choice % len(self.checkpoints)
        self.checkpoints = self.checkpoints[: len(self.checkpoints) - lost]
        self.run = copy.deepcopy(self.checkpoints[-1])
        run = self.run
        resumed = self.ledger.resume(
            run.incarnation,
            run.progress,
            oldest=max(0, run.version - STALENESS),
            expected=lambda key: (str(run.task(key)), 0),
        )
        assert resumed is not None
        run.incarnation, self.ready = resumed
        self.issued, self.first = [], 0
        # What was planned but neither ready nor trained.
        self.again = [key for key in run.tasks if key not in run.trained and key not in self.ready]
        self.first = run.next_key
        self.check()

    def check(self) -> None:
        """The file tells the life that led to these weights, and no other."""
        told = sorted((int(task), state) for task, state in self.ledger.ended())
        assert told == sorted(self.run.ended)
        current = dict(
            ((batch, slot), (int(task), state))
            for batch, slot, task, state in query(
                self.ledger, "SELECT batch, slot, task_id, state FROM groups ORDER BY round"
            )
        )
        for key in self.ready:
            assert current[key] == (self.run.tasks[key], "ready")
        assert self.ready.keys() == {key for key, (_, state) in current.items() if state == "ready"}


EVENTS = ("work", "work", "issue", "issue", "answer", "fail", "fail", "filter", "drop", "train", "save", "save", "die")
