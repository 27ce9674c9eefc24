"""Resuming: what of the file is still true at a checkpoint, case by case and through whole simulated runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey, Progress, Turn
from tests.buffer.groups import bring, dump, make_group, query

KEY = GroupKey(5, 0)
ROWS = "SELECT round, task_id, state, step FROM groups WHERE batch = 5 ORDER BY round"


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger.open(":memory:") as ledger:
        ledger.begin()
        yield ledger


def resume(ledger: Ledger, task: str | None, version: int = 5, oldest: int = 0) -> dict[GroupKey, int]:
    expected = None if task is None else (task, 0)
    resumed = ledger.resume(1, Progress(version), oldest=oldest, expected=lambda key: expected)
    assert resumed is not None
    return resumed[1]


@pytest.mark.parametrize("state", [State.READY, State.LEASED, State.TRAINED])
@pytest.mark.parametrize(
    ("task", "version", "oldest", "kept"),
    [
        ("a", 5, 4, True),
        ("a", 5, 5, False),  # too old
        ("a", 4, 4, False),  # of weights that are no more
        ("b", 5, 4, False),
        (None, 5, 4, False),
    ],
)
def test_experience_is_kept_where_it_fits(
    ledger: Ledger, state: State, task: str | None, version: int, oldest: int, kept: bool
) -> None:
    bring(ledger, KEY, state, "a", version=4, step=6)
    assert resume(ledger, task, version, oldest) == ({KEY: 4} if kept else {})
    assert query(ledger, ROWS) == [(0, "a", "ready" if kept else "dropped", None)]
    if kept:
        assert ledger.lease([KEY]) == [make_group(KEY, "a", 4)]
    else:
        ledger.issue(KEY, "b", 0, 0)
        assert query(ledger, "SELECT attempts, incarnation FROM groups") == [(2, 2)]


def test_what_was_issued_is_issued_again(ledger: Ledger) -> None:
    bring(ledger, KEY, State.ISSUED)
    assert resume(ledger, "task") == {}
    assert query(ledger, ROWS) == [(0, "task", "dropped", None)]


@pytest.mark.parametrize("state", sorted(set(State) - {State.FAILED, State.FILTERED}))
def test_what_the_weights_contain_is_trained_whatever_the_file_knows(ledger: Ledger, state: State) -> None:
    bring(ledger, KEY, state, step=3)
    bring(ledger, GroupKey(9, 0), state, step=3)
    bring(ledger, GroupKey(4, 0), State.READY, version=2)
    progress = Progress(7, behind=frozenset([GroupKey(4, 0)]), ahead=frozenset([GroupKey(9, 0)]))
    assert ledger.resume(1, progress, oldest=0, expected=lambda key: ("task", 0)) == (2, {GroupKey(4, 0): 2})
    step = 3 if state is State.TRAINED else 6
    assert query(ledger, "SELECT batch, state, step FROM groups ORDER BY batch") == [
        (4, "ready", None),
        (5, "trained", step),
        (9, "trained", step),
    ]


def fail(ledger: Ledger, task: str, step: int) -> None:
    ledger.issue(KEY, task, 0, 0)
    ledger.failed(KEY, "boom", step)


A4, A5, A6, B5, B6 = ((number, task, "failed", s) for number, task, s in
                      ((0, "a", 4), (0, "a", 5), (0, "a", 6), (1, "b", 5), (1, "b", 6)))  # fmt: skip


@pytest.mark.parametrize(
    ("failed", "then", "expected", "left"),
    [
        ("a4", "b", "b", [A4, (1, "b", "ready", None)]),
        ("a4", "b", "c", [A4, (1, "b", "dropped", None)]),
        ("a4", None, "b", [A4]),
        ("a5", "b", "b", [A5, (1, "b", "ready", None)]),  # failed before the checkpoint of the same version
        ("a5", "b", "a", []),  # after it
        ("a5", None, "b", [A5]),  # before it, and the next task was not issued yet
        ("a5", None, "a", []),
        ("a5", None, None, []),
        ("a5", "c", "b", []),  # another plan
        ("a6", "b", "a", []),
        ("a6", None, "b", []),
        ("a4 b5", "c", "b", [A4]),
        ("a4 b5", "c", "c", [A4, B5, (2, "c", "ready", None)]),
        ("a4 b6", None, None, [A4]),
        ("a5 b6", "c", "b", [A5]),
        ("a5 b6", "c", "a", []),
        ("a5 b5", None, "c", [A5, B5]),
    ],
)
def test_a_task_that_failed_has_failed_only_before_the_checkpoint(
    ledger: Ledger, failed: str, then: str | None, expected: str | None, left: list[tuple[object, ...]]
) -> None:
    for word in failed.split():
        fail(ledger, word[0], int(word[1]))
    if then is not None:
        bring(ledger, KEY, State.READY, then, version=4)
    ready = resume(ledger, expected)
    assert query(ledger, ROWS) == left
    assert ready == ({KEY: 4} if left and left[-1][2] == "ready" else {})
    assert query(ledger, "SELECT DISTINCT round FROM experiences") == [row[:1] for row in left if row[2] != "failed"]


def test_a_task_that_another_slot_took_was_not_this_ones(ledger: Ledger) -> None:
    fail(ledger, "b", 5)
    bring(ledger, GroupKey(4, 1), State.DROPPED, "a")  # an earlier replacement
    assert resume(ledger, "a") == {}
    assert query(ledger, ROWS) == []


def test_what_an_earlier_resume_dropped_is_no_longer_the_plan(ledger: Ledger) -> None:
    bring(ledger, GroupKey(9, 0), State.ISSUED, "b")
    assert ledger.resume(1, Progress(3), oldest=0, expected=lambda key: None) == (2, {})
    fail(ledger, "a", 5)
    assert ledger.resume(2, Progress(5), oldest=0, expected=lambda key: ("b", 0)) == (3, {})
    assert query(ledger, ROWS) == [A5]


def test_another_history_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    def resumed(ledger: Ledger, incarnation: int, version: int) -> bool:
        before = dump(ledger)
        result = ledger.resume(incarnation, Progress(version), oldest=0, expected=lambda key: None)
        assert (dump(ledger) == before) == (result is None)
        return result is not None

    with Ledger.open(tmp_path / "buffer.sqlite") as ledger:
        assert not resumed(ledger, 1, 0)
        ledger.begin(version=2)
        bring(ledger, GroupKey(2, 0), State.TRAINED, step=2)
        assert not resumed(ledger, 1, 1)
        assert not resumed(ledger, 2, 2)
        assert resumed(ledger, 1, 6)  # incarnation 2
        assert resumed(ledger, 1, 6)  # 3
        assert resumed(ledger, 2, 4 + 2)  # 4
        assert not resumed(ledger, 1, 7)
        assert resumed(ledger, 1, 3)  # 5
        assert not resumed(ledger, 4, 6)
        assert resumed(ledger, 5, 8)  # 6
        assert ledger.begin() == 7
        assert ledger.ended() == []
        assert resumed(ledger, 6, 8)  # of the older run
        assert ledger.trained_tasks() == ["task"]


def test_a_group_that_is_behind_is_not_trained_whatever_the_file_says(ledger: Ledger) -> None:
    bring(ledger, KEY, State.TRAINED, "a", version=4, step=6)
    progress = Progress(8, behind=frozenset([KEY, GroupKey(6, 0)]))  # the latter was never issued
    assert ledger.resume(1, progress, oldest=4, expected=lambda key: ("a", 0)) == (2, {KEY: 4})
    assert query(ledger, ROWS) == [(0, "a", "ready", None)]


def test_an_error_of_the_plan_changes_nothing(ledger: Ledger) -> None:
    def plan(key: GroupKey) -> tuple[str, int]:
        raise ConfigurationError("no such task")

    bring(ledger, KEY, State.READY)
    before = dump(ledger)
    with pytest.raises(ConfigurationError, match="no such task"):
        ledger.resume(1, Progress(5), oldest=0, expected=plan)
    assert dump(ledger) == before
    assert ledger.lease([KEY]) == [make_group(KEY, "task")]


def test_the_plan_is_not_asked_about_the_lost_future(ledger: Ledger) -> None:
    asked = []
    for batch in range(3, 30):
        bring(ledger, GroupKey(batch, 0), State.TRAINED, version=batch, step=batch)
    assert ledger.resume(1, Progress(5), oldest=4, expected=lambda key: asked.append(key)) == (2, {})
    assert asked == []  # of batch 4 are trained; of 5 and on the newest version is 6


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


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(EVENTS),
            st.integers(0, 5),
        ),
        min_size=20,
        max_size=80,
    )
)
def test_each_task_ends_once_in_the_life_of_the_final_weights(story: list[tuple[str, int]]) -> None:
    with Ledger.open(":memory:") as ledger:
        simulation = Simulation(ledger)
        for event, choice in story:
            getattr(simulation, event)(choice)
        while simulation.run.version < BATCHES:
            simulation.work(0)
        simulation.check()
        tasks = sorted(task for task, _ in simulation.run.ended)
        assert len(set(tasks)) == len(tasks)
