"""The ledger against a dictionary that says the same, through every kind of reopening; and against SIGKILL."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import Experience, Group, GroupKey, Turn

ROOT = Path(__file__).parents[2]


def make_group(key: GroupKey, task_id: str, version: int = 0, samples: int = 2) -> Group:
    turns = (
        Turn((1, 2), (3,), (-0.5,), (version + 1,), "stop"),
        Turn((1, 2, 3), (4, 5), (-0.25, float("-inf")), (version, version + 1), "length"),
    )
    return Group(key, task_id, tuple(Experience(task_id, i, turns, i / 3, "text é", 1.5, 0.1) for i in range(samples)))


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger.open(":memory:") as ledger:
        ledger.begin_incarnation()
        yield ledger


def bring(ledger: Ledger, key: GroupKey, state: State) -> None:
    """Take a new group to a state by the shortest way."""
    ledger.issue(key, "task", 0, 0)
    if state in (State.READY, State.LEASED, State.TRAINED):
        ledger.ready(make_group(key, "task"))
    if state in (State.LEASED, State.TRAINED):
        ledger.lease([key])
    if state is State.TRAINED:
        ledger.trained()
    if state is State.FAILED:
        ledger.failed(key, "boom")
    if state is State.DROPPED:
        ledger.dropped(key)


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


def test_columns_for_sql_readers(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin_incarnation()
        ledger.issue(GroupKey(2, 1), "t", epoch=4, explorer=5)
        ledger.ready(make_group(GroupKey(2, 1), "t", version=7))
        with closing(sqlite3.connect(path)) as reader:  # while the run goes on
            group = reader.execute(
                "SELECT incarnation, batch, slot, epoch, task_id, state, explorer, attempts, oldest_version, error"
                " FROM groups"
            ).fetchall()
            experiences = reader.execute(
                "SELECT batch, slot, sample, reward, num_tokens, oldest_version, finish_reason FROM experiences"
            ).fetchall()
            assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert group == [(1, 2, 1, 4, "t", "ready", 5, 1, 7, None)]
    assert experiences == [(2, 1, 0, 0.0, 3, 7, "length"), (2, 1, 1, 1 / 3, 3, 7, "length")]


MOVES = {
    "issue": lambda ledger, key: ledger.issue(key, "task", 0, 1),
    "ready": lambda ledger, key: ledger.ready(make_group(key, "task")),
    "trained": lambda ledger, key: ledger.trained(),
    "failed": lambda ledger, key: ledger.failed(key, "boom"),
    "dropped": lambda ledger, key: ledger.dropped(key),
}
LEGAL = {
    "issue": {State.ISSUED, State.DROPPED, State.FAILED},
    "ready": {State.ISSUED},
    "trained": {State.LEASED},
    "failed": {State.ISSUED},
    "dropped": {State.ISSUED, State.READY, State.LEASED},
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("state", [state for state in State if state is not State.FILTERED])
def test_illegal_transitions_are_refused_and_change_nothing(ledger: Ledger, move: str, state: State) -> None:
    bring(ledger, GroupKey(5, 2), state)
    before = list(ledger._connection.iterdump())
    if state in LEGAL[move]:
        MOVES[move](ledger, GroupKey(5, 2))
        return
    with pytest.raises(ScheduleError) as error:
        MOVES[move](ledger, GroupKey(5, 2))
    assert list(ledger._connection.iterdump()) == before
    if move != "trained":
        goal = {"issue": "issued"}.get(move, move)
        assert "(5, 2)" in str(error.value) and state.value in str(error.value) and goal in str(error.value)


def test_groups_never_issued_are_refused(ledger: Ledger) -> None:
    for move in ("ready", "trained", "failed", "dropped"):
        with pytest.raises(ScheduleError):
            MOVES[move](ledger, GroupKey(0, 0))
    assert sum(ledger.counts().values()) == 0


def test_issue_needs_an_incarnation() -> None:
    with Ledger.open(":memory:") as ledger, pytest.raises(ScheduleError, match="begin_incarnation"):
        ledger.issue(GroupKey(0, 0), "t", 0, 0)


def test_a_further_issue_counts_and_forgets(ledger: Ledger) -> None:
    key = GroupKey(0, 0)
    row = "SELECT task_id, state, explorer, attempts, oldest_version, error FROM groups"
    ledger.issue(key, "a", 0, explorer=0)
    ledger.ready(make_group(key, "a", version=3))
    ledger.dropped(key)
    ledger.issue(key, "b", 0, explorer=1)
    assert ledger._connection.execute(row).fetchall() == [("b", "issued", 1, 2, None, None)]
    ledger.failed(key, "boom")
    assert ledger._connection.execute(row).fetchall() == [("b", "failed", 1, 2, None, "boom")]
    ledger.issue(key, "b", 0, explorer=2)
    assert ledger._connection.execute(row).fetchall() == [("b", "issued", 2, 3, None, None)]
    with pytest.raises(ScheduleError, match="another task"):
        ledger.ready(make_group(key, "a"))
    ledger.ready(make_group(key, "b", samples=1))  # fewer samples than the dropped ones: none of those is left
    assert ledger.lease([key]) == [make_group(key, "b", samples=1)]


def test_a_group_without_experiences_is_refused(ledger: Ledger) -> None:
    ledger.issue(GroupKey(0, 0), "t", 0, 0)
    with pytest.raises(ScheduleError, match="no experiences"):
        ledger.ready(Group(GroupKey(0, 0), "t", ()))


def test_a_failing_store_stores_nothing(ledger: Ledger) -> None:
    key = GroupKey(0, 0)
    ledger.issue(key, "t", 0, 0)
    twice = make_group(key, "t").experiences[:1] * 2
    with pytest.raises(sqlite3.IntegrityError):
        ledger.ready(Group(key, "t", twice))
    assert ledger.counts()[State.ISSUED] == 1
    assert ledger._connection.execute("SELECT count(*) FROM experiences").fetchone() == (0,)


def test_trained_tasks_are_in_training_order(ledger: Ledger) -> None:
    for batch, epoch in ((0, 0), (1, 0), (2, 1)):
        for slot in range(2):
            ledger.issue(GroupKey(batch, slot), f"{batch}{slot}", epoch, 0)
            ledger.ready(make_group(GroupKey(batch, slot), f"{batch}{slot}"))
    for batch in (1, 2, 0):
        ledger.lease([GroupKey(batch, slot) for slot in range(2)])
        ledger.trained()
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
        assert second.begin_incarnation() == 1


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


def test_older_incarnations_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    left = [State.ISSUED, State.READY, State.TRAINED, State.LEASED, State.FAILED, State.DROPPED]
    with Ledger.open(path) as ledger:
        assert ledger.begin_incarnation() == 1
        for batch, state in enumerate(left):
            bring(ledger, GroupKey(batch, 0), state)
    with Ledger.open(path) as ledger:
        assert ledger.trained_tasks() == ["task"]  # a reader that begins none sees the last
        assert ledger.begin_incarnation() == 2
        assert sum(ledger.counts().values()) == 0 and ledger.trained_tasks() == []
        states = [row[0] for row in ledger._connection.execute("SELECT state FROM groups ORDER BY batch")]
        assert states == ["dropped", "dropped", "trained", "dropped", "failed", "dropped"]
        bring(ledger, GroupKey(0, 0), State.READY)


@dataclass
class Row:
    """What the model knows of one group."""

    state: State
    task_id: str
    epoch: int
    attempts: int
    group: Group | None = None


KEYS = st.builds(GroupKey, st.integers(0, 2), st.integers(0, 1))


class LedgerMachine(RuleBasedStateMachine):
    """Every method with any argument at any time, legal or not, in step with a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.crashes = 0
        self.rows: dict[GroupKey, Row] = {}
        self.trained: list[tuple[int, str]] = []
        self.incarnation = 0

    @initialize()
    def start(self) -> None:
        self.ledger = Ledger.open(self.folder / "0.sqlite")
        self.begin()

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    @precondition(lambda self: self.incarnation < 3)
    @rule()
    def begin(self) -> None:
        self.incarnation += 1
        assert self.ledger.begin_incarnation() == self.incarnation
        self.rows, self.trained = {}, []

    @rule(key=KEYS, task=st.sampled_from("ab"), epoch=st.integers(0, 1), explorer=st.integers(0, 1))
    def issue(self, key: GroupKey, task: str, epoch: int, explorer: int) -> None:
        old = self.rows.get(key)
        if old and old.state not in (State.ISSUED, State.DROPPED, State.FAILED):
            with pytest.raises(ScheduleError):
                self.ledger.issue(key, task, epoch, explorer)
            return
        self.ledger.issue(key, task, epoch, explorer)
        self.rows[key] = Row(State.ISSUED, task, epoch, old.attempts + 1 if old else 1)

    @rule(key=KEYS, task=st.sampled_from("ab"), version=st.integers(0, 3), samples=st.integers(1, 3))
    def ready(self, key: GroupKey, task: str, version: int, samples: int) -> None:
        row, group = self.rows.get(key), make_group(key, task, version, samples)
        if row is None or row.state is not State.ISSUED or row.task_id != task:
            with pytest.raises(ScheduleError):
                self.ledger.ready(group)
            return
        self.ledger.ready(group)
        row.state, row.group = State.READY, group

    @rule(keys=st.lists(KEYS, unique=True, max_size=3))
    def lease(self, keys: list[GroupKey]) -> None:
        rows = [self.rows.get(key) for key in keys]
        ready = [row for row in rows if row is not None and row.state is State.READY]
        if len(ready) < len(keys):
            with pytest.raises(ScheduleError):
                self.ledger.lease(keys)
            return
        assert self.ledger.lease(keys) == [row.group for row in ready]
        for row in ready:
            row.state = State.LEASED

    @rule()
    def release(self) -> None:
        self.ledger.release()
        for row in self.leased():
            row.state = State.READY

    @rule()
    def train(self) -> None:
        leased = self.leased()
        if not leased:
            with pytest.raises(ScheduleError):
                self.ledger.trained()
            return
        self.ledger.trained()
        for row in leased:
            row.state = State.TRAINED
            self.trained.append((row.epoch, row.task_id))

    @rule(key=KEYS)
    def fail(self, key: GroupKey) -> None:
        row = self.rows.get(key)
        if row is None or row.state is not State.ISSUED:
            with pytest.raises(ScheduleError):
                self.ledger.failed(key, "boom")
            return
        self.ledger.failed(key, "boom")
        row.state = State.FAILED

    @rule(key=KEYS)
    def drop(self, key: GroupKey) -> None:
        row = self.rows.get(key)
        if row is None or row.state not in (State.ISSUED, State.READY, State.LEASED):
            with pytest.raises(ScheduleError):
                self.ledger.dropped(key)
            return
        self.ledger.dropped(key)
        row.state = State.DROPPED

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = Ledger.open(self.path)

    @rule()
    def crash(self) -> None:
        """Go on with the files as the killed process leaves them: the log not yet merged into the database."""
        old = self.path
        self.crashes += 1
        for suffix in ("", "-wal"):
            shutil.copy(f"{old}{suffix}", f"{self.path}{suffix}")
        self.ledger.close()
        self.ledger = Ledger.open(self.path)

    @rule()
    def crash_within_a_transaction(self) -> None:
        self.ledger._connection.execute("BEGIN IMMEDIATE")
        self.ledger._connection.execute("DELETE FROM experiences")
        self.ledger._connection.execute("UPDATE groups SET state = 'filtered'")
        self.crash()

    @property
    def path(self) -> Path:
        return self.folder / f"{self.crashes}.sqlite"

    def leased(self) -> list[Row]:
        return [row for _, row in sorted(self.rows.items()) if row.state is State.LEASED]

    @invariant()
    def agrees(self) -> None:
        counts = dict.fromkeys(State, 0)
        for row in self.rows.values():
            counts[row.state] += 1
        assert self.ledger.counts() == counts
        assert self.ledger.trained_tasks() == [task for _, task in self.trained]
        assert self.ledger.trained_tasks(epoch=1) == [task for epoch, task in self.trained if epoch == 1]
        stored = self.ledger._connection.execute(
            "SELECT batch, slot, state, task_id, epoch, attempts, oldest_version,"
            " (SELECT count(*) FROM experiences e WHERE e.incarnation = g.incarnation AND e.batch = g.batch"
            " AND e.slot = g.slot) FROM groups g WHERE incarnation = ? ORDER BY batch, slot",
            (self.incarnation,),
        ).fetchall()
        assert stored == [
            (*key, row.state.value, row.task_id, row.epoch, row.attempts)
            + ((row.group.oldest_version, len(row.group.experiences)) if row.group else (None, 0))
            for key, row in sorted(self.rows.items())
        ]


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

WRITER = """
import sys
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.experience import Experience, Group, GroupKey, Turn

ledger = Ledger.open(sys.argv[1])
ledger.begin_incarnation()
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
            assert ledger._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert ledger._incarnation == incarnation
            for batch in range(reported + 1):
                (group,) = ledger.lease([GroupKey(batch, 0)])
                assert group.task_id == str(batch)
                assert [experience.reward for experience in group.experiences] == list(range(8))
                assert {experience.turns[0].versions for experience in group.experiences} == {(batch,) * 300}
            # Of the group in flight there is nothing, or all of it.
            last = "SELECT count(*) FROM experiences WHERE incarnation = ? AND batch = ?"
            assert ledger._connection.execute(last, (incarnation, reported + 1)).fetchone()[0] in (0, 8)
