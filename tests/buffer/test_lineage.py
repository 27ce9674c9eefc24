"""Resuming: what of the file is still true at a checkpoint, case by case and through whole simulated runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import GroupKey, Progress
from tests.buffer.groups import bring, dump, make_group, query
from tests.buffer.lives import BATCHES, EVENTS, Simulation

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
