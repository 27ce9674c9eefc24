"""Pruning: what a resume asks about stays, whatever happened before, and the file stops growing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.buffer.reader import read_pruned, stored_keys
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey, Progress, Turn
from lightning_rft.report.page import write_report
from tests.buffer.groups import as_format_3, bring, dump, make_group, query
from tests.buffer.lives import BATCHES, EVENTS, Simulation

ROWS = "SELECT batch, slot, round, task_id, state, step, attempts, oldest_version, newest_version, samples FROM groups"


class Both:
    """A ledger that is pruned, and one that is told the same otherwise, which must answer alike."""

    def __init__(self, whole: Ledger, pruned: Ledger) -> None:
        self.whole, self.pruned = whole, pruned
        self._file = whole._file  # for questions
        self.ended = whole.ended

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            answer, other = (getattr(ledger, name)(*arguments, **settings) for ledger in (self.whole, self.pruned))
            assert answer == other, name
            return answer

        return call

    def left_out(self) -> list[tuple[Any, ...]]:
        """Batch, state and step of the groups that only the whole ledger has; all else must be the same."""
        whole, pruned = (set(query(ledger, ROWS)) for ledger in (self.whole, self.pruned))
        assert pruned <= whole
        gone = {row[:2] for row in whole - pruned}
        samples = "SELECT batch, slot, round, sample, turns FROM experiences ORDER BY batch, slot, round, sample"
        kept = [row for row in query(self.whole, samples) if row[:2] not in gone]
        assert query(self.pruned, samples) == kept
        return [(batch, slot, state, step) for batch, slot, _, _, state, step, *_ in whole - pruned]


class Pruned(Simulation):
    """A run that is pruned now and then, and resumes from whatever checkpoint that leaves it."""

    def __init__(self, ledger: Both) -> None:
        super().__init__(ledger)  # type: ignore[arg-type]
        self.both = ledger
        self.floor = 0

    def prune(self, choice: int) -> None:
        floor = max(0, self.run.version - choice % 3)
        self.floor = max(self.floor, floor)
        self.both.pruned.prune(floor)

    def die(self, choice: int) -> None:
        able = sum(checkpoint.version >= self.floor for checkpoint in self.checkpoints)
        if able:
            super().die(choice % able)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from([*EVENTS, "prune", "die"]), st.integers(0, 5)), min_size=20, max_size=80))
def test_a_resume_finds_what_it_would_have_found(story: list[tuple[str, int]]) -> None:
    with Ledger.open(":memory:") as whole, Ledger.open(":memory:") as pruned:
        both = Both(whole, pruned)
        run = Pruned(both)
        for event, choice in story:
            getattr(run, event)(choice)
        while run.run.version < BATCHES:
            run.work(0)
            run.prune(1)
        run.check()  # that every task ended once, and the resumes before
        for batch, slot, state, step in both.left_out():
            assert batch < run.floor and (state != "trained" or step < run.floor)
            assert GroupKey(batch, slot) in run.run.trained
        old = "SELECT * FROM groups WHERE state = 'trained' AND step < ? AND batch < ?"
        assert not query(pruned, old, run.floor, run.floor)


def trained(ledger: Ledger, batches: int, keep: int | None = None) -> None:
    for batch in range(batches):
        bring(ledger, GroupKey(batch, 0), State.TRAINED, f"task {batch}", max(0, batch - 1), batch)
        if keep is not None:
            ledger.prune(batch + 1 - keep)


def test_from_further_back_the_file_has_another_history() -> None:
    with Ledger.open(":memory:") as ledger:
        ledger.begin()
        trained(ledger, 10, keep=3)
        assert [row[0] for row in query(ledger, "SELECT batch FROM groups ORDER BY batch")] == [7, 8, 9]
        before, never = dump(ledger), lambda key: pytest.fail("was asked")
        assert ledger.resume(1, Progress(6), oldest=0, expected=never) is None
        assert dump(ledger) == before
        assert ledger.resume(1, Progress(7), oldest=0, expected=lambda key: (f"task {key.batch}", 0)) == (
            2,
            {GroupKey(7, 0): 6},  # which was explored with versions 6 and 7
        )


def test_what_was_trained_ahead_or_is_behind_stays() -> None:
    with Ledger.open(":memory:") as ledger:
        ledger.begin()
        bring(ledger, GroupKey(0, 0), State.TRAINED, step=0)
        bring(ledger, GroupKey(9, 0), State.TRAINED, step=0)  # ahead of its batch
        bring(ledger, GroupKey(0, 1), State.TRAINED, step=5)  # behind
        bring(ledger, GroupKey(0, 2), State.READY)
        bring(ledger, GroupKey(1, 0), State.FAILED, step=1)
        ledger.prune(5)
        assert query(ledger, "SELECT batch, slot FROM groups ORDER BY batch, slot") == [(0, 1), (0, 2), (1, 0), (9, 0)]
        ledger.issue(GroupKey(1, 0), "another", 0, 0)
        ledger.ready(make_group(GroupKey(1, 0), "another"))
        ledger.lease([GroupKey(1, 0)])
        ledger.trained(6)
        ledger.prune(7)  # with the round that failed
        assert query(ledger, "SELECT batch, slot FROM groups ORDER BY batch, slot") == [(0, 2), (9, 0)]
        assert query(ledger, "SELECT * FROM pruned") == [(1, 7, 4, 6)]
        bring(ledger, GroupKey(3, 0), State.TRAINED, step=3)
        ledger.prune(6)  # what cannot be resumed from stays so
        assert query(ledger, "SELECT * FROM pruned") == [(1, 7, 5, 8)]


def test_other_runs_of_the_file_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        trained(ledger, 3)
    as_format_3(path)
    with Ledger.open(path) as ledger:
        ledger.begin()
        trained(ledger, 3, keep=1)
    assert [key[:2] for key in stored_keys(path)] == [(1, 0), (1, 1), (1, 2), (2, 2)]
    assert read_pruned(path) == [(2, 2, 2, 4)]


def test_a_file_from_before_pruning_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        trained(ledger, 2)
        ledger._file.execute("DROP TABLE pruned")
    assert read_pruned(path) == []
    with Ledger.open(path) as ledger:
        assert ledger.resume(1, Progress(2), oldest=0, expected=lambda key: None) == (2, {})
        ledger.prune(1)
    assert read_pruned(path) == [(1, 1, 1, 2)]


def test_the_file_stops_growing(tmp_path: Path) -> None:
    turn = Turn((1,), (2,), (-1.0,), (0,), "stop")

    def pages(keep: int | None) -> list[int]:
        with Ledger.open(tmp_path / f"{keep}.sqlite") as ledger:
            ledger.begin()
            found = []
            for batch in range(400):
                key, task = GroupKey(batch, 0), str(batch)
                ledger.issue(key, task, 0, 0)
                text = "x" * (20_000 + 1000 * (batch % 7))
                ledger.ready(Group(key, task, (Experience(task, 0, (turn,), 1.0, text),)))
                ledger.lease([key])
                ledger.trained(batch)
                if keep is not None:
                    ledger.prune(batch + 1 - keep)
                if batch in (99, 399):
                    found += query(ledger, "PRAGMA page_count")[0]
            return found

    early, late = pages(None)
    assert late > 3 * early
    early, late = pages(10)
    assert late == early


def test_a_batch_is_marked_without_a_look_at_every_group_of_the_run() -> None:
    plans: list[str] = []
    with Ledger.open(":memory:") as ledger:
        ledger.begin()
        bring(ledger, GroupKey(0, 0), State.LEASED)
        ledger._file.connection.set_trace_callback(plans.append)
        ledger.release()
        ledger.lease([GroupKey(0, 0)])
        ledger.trained(0)
        ledger._file.connection.set_trace_callback(None)
        updates = [plan for plan in plans if plan.startswith("UPDATE") and "WHERE run = 1 AND state" in plan]
        assert len(updates) == 2
        for update in updates:
            assert "USING INDEX groups_leased" in query(ledger, f"EXPLAIN QUERY PLAN {update}")[0][-1]


@pytest.mark.parametrize("keep", [0, -1])
def test_it_counts_batches(keep: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"Buffer\(keep={keep}\) must be at least 1: it counts batches"):
        rft.Buffer(keep=keep)


def test_a_report_says_what_is_gone_and_keeps_to_the_logger(tmp_path: Path) -> None:
    (tmp_path / "rft").mkdir()
    (tmp_path / "metrics.csv").write_text("step,rft/reward\n0,0.25\n5,0.5\n")
    with Ledger.open(tmp_path / "rft" / "buffer.sqlite") as ledger:
        ledger.begin()
        trained(ledger, 6, keep=2)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Run 1: 4 groups with 8 samples, of batches before 4, are neither counted nor shown" in page
    assert '"lines":[[[0,0.25],[5,0.5]]]' in page
