"""What each method of the ledger does, allows and refuses; and what SIGKILL leaves."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from tests.buffer.groups import as_format_3, bring, dump, make_group, query

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger.open(":memory:") as ledger:
        ledger.begin()
        yield ledger


def test_changes_happen_together_or_not_at_all(ledger: Ledger) -> None:
    with ledger.together():
        bring(ledger, GroupKey(0, 0), State.READY)
        bring(ledger, GroupKey(0, 1), State.READY)

    def issue(*keys: GroupKey) -> None:
        with ledger.together():
            for key in keys:
                ledger.issue(key, "task", epoch=0, explorer=0)

    with pytest.raises(ScheduleError, match="ready"):
        issue(GroupKey(1, 0), GroupKey(0, 0))
    assert ledger.counts()[State.ISSUED] == 0
    assert ledger.counts()[State.READY] == 2
    issue(GroupKey(1, 0))


def test_a_group_comes_back_as_it_went_in(ledger: Ledger) -> None:
    groups = [make_group(GroupKey(3, slot), f"t{slot}", version=slot, samples=4) for slot in range(3)]
    for group in reversed(groups):
        ledger.issue(group.key, group.task_id, epoch=1, explorer=0)
        ledger.ready(group)
    keys = [group.key for group in groups]
    assert ledger.lease(keys) == groups
    with pytest.raises(ScheduleError, match="leased"):
        ledger.lease(keys[:1])
    ledger.release()
    assert ledger.lease(keys[::-1]) == groups[::-1]


def test_what_is_stored_is_not_kept_in_memory_too(ledger: Ledger) -> None:
    key = GroupKey(0, 0)
    ledger.issue(key, "t", epoch=0, explorer=0)
    group = make_group(key, "t")
    stored = weakref.ref(group)
    ledger.ready(group)
    del group
    read = weakref.ref(ledger.read([key])[0])
    assert stored() is None and read() is None


def test_columns_for_sql_readers(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        ledger.issue(GroupKey(2, 1), "t", epoch=4, explorer=5)
        ledger.ready(make_group(GroupKey(2, 1), "t", version=7))
        with closing(sqlite3.connect(path)) as reader:  # while the run goes on
            group = reader.execute(
                "SELECT run, batch, slot, round, epoch, task_id, state, explorer, attempts, incarnation,"
                " oldest_version, newest_version, step, error FROM groups"
            ).fetchall()
            experiences = reader.execute(
                "SELECT batch, slot, sample, reward, num_tokens, newest_version, finish_reason, text FROM experiences"
            ).fetchall()
            assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert group == [(1, 2, 1, 0, 4, "t", "ready", 5, 1, 1, 7, 8, None, None)]
    assert experiences == [(2, 1, 0, 0.0, 3, 8, "length", "text é"), (2, 1, 1, 1 / 3, 3, 8, "length", "text é")]


MOVES = {
    "issue": lambda ledger, key: ledger.issue(key, "task", 0, 1),
    "issue another": lambda ledger, key: ledger.issue(key, "another", 0, 1),
    "ready": lambda ledger, key: ledger.ready(make_group(key, "task")),
    "leased": lambda ledger, key: ledger.lease([key]),
    "trained": lambda ledger, key: ledger.trained(0),
    "filtered": lambda ledger, key: ledger.filtered(key, 0),
    "failed": lambda ledger, key: ledger.failed(key, "boom", 0),
    "dropped": lambda ledger, key: ledger.dropped(key),
}
LEGAL = {
    "issue": {State.ISSUED, State.DROPPED},
    "issue another": {State.ISSUED, State.DROPPED, State.FAILED, State.FILTERED},
    "ready": {State.ISSUED},
    "leased": {State.READY},
    "trained": {State.LEASED},
    "filtered": {State.ISSUED, State.READY, State.LEASED},
    "failed": {State.ISSUED},
    "dropped": {State.ISSUED, State.READY, State.LEASED},
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("state", State)
def test_illegal_transitions_are_refused_and_change_nothing(ledger: Ledger, move: str, state: State) -> None:
    bring(ledger, GroupKey(5, 2), state)
    before = dump(ledger)
    if state in LEGAL[move]:
        MOVES[move](ledger, GroupKey(5, 2))
        assert dump(ledger) != before
        return
    with pytest.raises(ScheduleError) as error:
        MOVES[move](ledger, GroupKey(5, 2))
    assert dump(ledger) == before
    if move != "trained":
        goal = "issued" if move.startswith("issue") else move
        assert "(5, 2)" in str(error.value) and state.value in str(error.value) and goal in str(error.value)


@pytest.mark.parametrize("move", sorted(MOVES.keys() - {"issue", "issue another"}))
def test_groups_never_issued_are_refused(ledger: Ledger, move: str) -> None:
    with pytest.raises(ScheduleError):
        MOVES[move](ledger, GroupKey(0, 0))
    assert sum(ledger.counts().values()) == 0


def test_issue_needs_a_run() -> None:
    with Ledger.open(":memory:") as ledger, pytest.raises(ScheduleError, match="begin or resume"):
        ledger.issue(GroupKey(0, 0), "t", 0, 0)


ROW = "SELECT round, task_id, state, explorer, attempts, oldest_version, step, error FROM groups ORDER BY round"


def test_a_further_issue_counts_and_forgets(ledger: Ledger) -> None:
    key = GroupKey(0, 0)
    ledger.issue(key, "a", 0, explorer=0)
    ledger.ready(make_group(key, "a", version=3))
    ledger.dropped(key)
    ledger.issue(key, "b", 0, explorer=1)
    assert query(ledger, ROW) == [(0, "b", "issued", 1, 2, None, None, None)]
    with pytest.raises(ScheduleError, match="another task"):
        ledger.ready(make_group(key, "a"))
    ledger.ready(make_group(key, "b", samples=1))  # fewer samples than the dropped ones: none of those is left
    assert ledger.lease([key]) == [make_group(key, "b", samples=1)]


def test_an_ended_task_stays_and_the_slot_gets_another(ledger: Ledger) -> None:
    key = GroupKey(0, 0)
    ledger.issue(key, "a", 0, explorer=0)
    ledger.failed(key, "boom", 2)
    ledger.issue(key, "b", 0, explorer=1)
    ledger.ready(make_group(key, "b", version=3))
    ledger.filtered(key, 4)
    with pytest.raises(ScheduleError, match="filtered"):
        ledger.issue(key, "b", 0, explorer=1)
    ledger.issue(key, "b", 1, explorer=1)  # of the next epoch
    ended = [(0, "a", "failed", 0, 1, None, 2, "boom"), (1, "b", "filtered", 1, 1, 3, 4, None)]
    assert query(ledger, ROW) == [*ended, (2, "b", "issued", 1, 1, None, None, None)]
    ledger.ready(make_group(key, "b", version=5))
    assert ledger.lease([key]) == [make_group(key, "b", version=5)]
    ledger.trained(5)
    assert query(ledger, ROW) == [*ended, (2, "b", "trained", 1, 1, 5, 5, None)]
    assert ledger.ended() == [("a", State.FAILED), ("b", State.FILTERED), ("b", State.TRAINED)]
    assert ledger.ended(epoch=1) == [("b", State.TRAINED)]
    assert ledger.trained_tasks() == ["b"] and ledger.trained_tasks(epoch=0) == []
    counts = dict.fromkeys(State, 0) | {State.FAILED: 1, State.FILTERED: 1, State.TRAINED: 1}
    assert ledger.counts() == counts
    assert query(ledger, "SELECT round, count(*) FROM experiences GROUP BY round") == [(1, 2), (2, 2)]


def test_a_group_without_experiences_is_refused(ledger: Ledger) -> None:
    ledger.issue(GroupKey(0, 0), "t", 0, 0)
    with pytest.raises(ScheduleError, match="no experiences"):
        ledger.ready(Group(GroupKey(0, 0), "t", ()))


def test_experiences_of_another_task_or_without_tokens_are_refused(ledger: Ledger) -> None:
    key = GroupKey(0, 0)
    ledger.issue(key, "t", 0, 0)
    empty = Experience("t", 1, (Turn((1,), (), (), (), "stop"),), 1.0)
    for bad in (empty, Experience("t", 1, (), 1.0), make_group(key, "u").experiences[1]):
        with pytest.raises(ScheduleError, match="its sample 1 has"):
            ledger.ready(Group(key, "t", (make_group(key, "t").experiences[0], bad)))
    assert ledger.counts()[State.ISSUED] == 1


def test_a_failing_store_stores_nothing(ledger: Ledger) -> None:
    key = GroupKey(0, 0)
    ledger.issue(key, "t", 0, 0)
    twice = make_group(key, "t").experiences[:1] * 2
    with pytest.raises(sqlite3.IntegrityError):
        ledger.ready(Group(key, "t", twice))
    assert ledger.counts()[State.ISSUED] == 1
    assert query(ledger, "SELECT count(*) FROM experiences") == [(0,)]


def test_trained_tasks_are_in_training_order(ledger: Ledger) -> None:
    for batch, epoch in ((0, 0), (1, 0), (2, 1)):
        for slot in range(2):
            ledger.issue(GroupKey(batch, slot), f"{batch}{slot}", epoch, 0)
            ledger.ready(make_group(GroupKey(batch, slot), f"{batch}{slot}"))
    for step, batch in enumerate((1, 2, 0)):
        ledger.lease([GroupKey(batch, slot) for slot in range(2)])
        ledger.trained(step)
    assert ledger.trained_tasks() == ["10", "11", "20", "21", "00", "01"]
    assert ledger.trained_tasks(epoch=0) == ["10", "11", "00", "01"]
    assert ledger.trained_tasks(epoch=9) == []


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "buffer.sqlite"
    first = Ledger.open(path)
    with pytest.raises(ConfigurationError, match=f"buffer .* is in use by another run .process {os.getpid()}"):
        Ledger.open(str(path))
    first.close()
    first.close()
    with Ledger.open(path) as second:
        assert second.begin() == 1


def test_files_that_are_no_ledger_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not a database, and long enough to have a header of its own" * 50)
    foreign = tmp_path / "foreign"
    with closing(sqlite3.connect(foreign)) as connection:
        connection.executescript("CREATE TABLE t (x); PRAGMA user_version = 1;")
    future = tmp_path / "future"
    Ledger.open(future).close()
    with closing(sqlite3.connect(future)) as connection:
        connection.execute("PRAGMA user_version = 99")
    for path, words in ((text, "SQLite"), (foreign, "another program"), (future, "format version 99")):
        before = path.read_bytes()
        for _ in range(2):  # a refusal must not keep the lock
            with pytest.raises(ConfigurationError, match=words) as error:
                Ledger.open(path)
            assert "`buffer`" in str(error.value)
        assert path.read_bytes() == before


@pytest.mark.parametrize("path", ["", "file/below"])
def test_paths_that_cannot_be_opened(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="set `buffer`"):
        Ledger.open(tmp_path / path)


def test_a_new_run_leaves_older_ones_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        name = ledger.id
        assert re.fullmatch("[0-9a-f]{32}", name)
        assert ledger.begin() == 1
        for batch, state in enumerate(sorted(State, key=lambda state: state is State.LEASED)):
            bring(ledger, GroupKey(batch, 0), state)
        before = query(ledger, "SELECT * FROM groups")
    with Ledger.open(path) as ledger:
        assert ledger.id == name
        assert ledger.trained_tasks() == ["task"]  # a reader that begins none sees the last
        assert ledger.begin(version=7) == 2
        assert sum(ledger.counts().values()) == 0 and ledger.trained_tasks() == []
        assert query(ledger, "SELECT * FROM groups") == before
        assert query(ledger, "SELECT number, run, version FROM incarnations") == [(1, 1, 0), (2, 2, 7)]
        bring(ledger, GroupKey(0, 0), State.LEASED)
        ledger.trained(7)
        assert query(ledger, "SELECT count(*) FROM groups WHERE state = 'leased'") == [(1,)]  # the older run's
    with Ledger.open(":memory:") as other:
        assert other.id != name


WRITER = """
import sys
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.experience import Experience, Group, GroupKey, Turn

ledger = Ledger.open(sys.argv[1])
ledger.begin()
ids = tuple(range(300))
for batch in range(10**6):
    key = GroupKey(batch, 0)
    ledger.issue(key, str(batch), 0, 0)
    turn = Turn(ids, ids, (-0.5,) * 300, (batch,) * 300, "stop")
    ledger.ready(Group(key, str(batch), tuple(Experience(str(batch), i, (turn,), i) for i in range(8))))
    print(batch, flush=True)
"""


def test_what_was_reported_ready_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    for incarnation, groups in enumerate((1, 20, 300), start=1):  # before and after the log is first merged
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(groups)]
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()  # what it wrote between our last read and its death counts too
        assert writer.returncode == -signal.SIGKILL and lines[0] == "0\n"
        reported = int([line for line in lines if line.endswith("\n")][-1])
        with Ledger.open(path) as ledger:
            assert query(ledger, "PRAGMA integrity_check") == [("ok",)]
            assert query(ledger, "SELECT max(number) FROM incarnations") == [(incarnation,)]
            for batch in range(reported + 1):
                (group,) = ledger.lease([GroupKey(batch, 0)])
                assert group.task_id == str(batch)
                assert [experience.reward for experience in group.experiences] == list(range(8))
                assert {tuple(experience.turns[0].versions) for experience in group.experiences} == {(batch,) * 300}
            # Of the group in flight there is nothing, or all of it.
            last = "SELECT count(*) FROM experiences WHERE run = ? AND batch = ?"
            assert query(ledger, last, incarnation, reported + 1)[0][0] in (0, 8)


def test_a_file_from_before_metrics_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        for slot in range(2):
            bring(ledger, GroupKey(0, slot), State.READY)
        stored = make_group(GroupKey(0, 0), "task")
    as_format_3(path)
    for _ in range(2):  # once it is brought up to date, and once it is
        with Ledger.open(path) as ledger:
            (group,) = ledger.read([GroupKey(0, 0)])
            assert group == replace(stored, experiences=tuple(replace(one, metrics={}) for one in stored.experiences))
    with Ledger.open(path) as ledger:
        bring(ledger, GroupKey(1, 0), State.READY)
        assert list(ledger.read([GroupKey(1, 0)])) == [make_group(GroupKey(1, 0), "task")]
