"""The ledger in step with a dictionary that says the same, dying and failing between any two statements.

A death is the files as they are at that moment, opened again: they must be as before the operation or as after it.
A failure is SQLite's own error from a statement: the ledger must be as before, and go on.
"""

from __future__ import annotations

import copy
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.buffer.resume import Round, settle
from lightning_rft.errors import ScheduleError, StorageError
from lightning_rft.experience import Group, GroupKey, Progress
from tests.buffer.groups import copy_as_killed, make_group, query

ENDED = (State.FAILED, State.FILTERED)


@dataclass
class Row:
    """What the model knows of one round of a group."""

    task: tuple[str, int]
    incarnation: int
    state: State = State.ISSUED
    attempts: int = 1
    step: int | None = None
    error: str | None = None
    group: Group | None = None


@dataclass
class Model:
    """The ledger as a dictionary. Methods are those of the ledger."""

    incarnations: list[tuple[int, int]] = field(default_factory=list)
    runs: dict[int, dict[GroupKey, dict[int, Row]]] = field(default_factory=dict)
    pruned: dict[int, list[int]] = field(default_factory=dict)  # run -> before, groups, samples

    @property
    def rows(self) -> dict[GroupKey, dict[int, Row]]:
        return self.runs[self.incarnations[-1][0]]

    def current(self, key: GroupKey, *legal: State) -> Row:
        rounds = self.rows.get(key)
        if not rounds or rounds[max(rounds)].state not in legal:
            raise ScheduleError
        return rounds[max(rounds)]

    def in_state(self, state: State) -> list[Row]:
        return [row for rounds in self.rows.values() for row in rounds.values() if row.state is state]

    def begin(self, version: int) -> int:
        run = max(self.runs, default=0) + 1
        self.runs[run] = {}
        self.incarnations.append((run, version))
        return len(self.incarnations)

    def resume(
        self,
        incarnation: int,
        progress: Progress,
        oldest: int,
        expected: Callable[[GroupKey], tuple[str, int] | None],
    ) -> tuple[int, dict[GroupKey, int]] | None:
        if incarnation > len(self.incarnations):
            return None
        run, start = self.incarnations[incarnation - 1]
        later = [version for other, version in self.incarnations[incarnation:] if other == run]
        if start > progress.version or min(later, default=progress.version) < progress.version:
            return None
        if self.pruned.get(run, [0])[0] > progress.version:
            return None
        history: dict[GroupKey, list[Round]] = {}
        for key, rounds in sorted(self.runs[run].items()):
            for number, row in rounds.items():
                settled = key.batch < progress.version and row.step is not None and row.step < progress.version
                if not settled or key in progress.behind:
                    versions = (row.group.oldest_version, row.group.newest_version) if row.group else (None, None)
                    entry = Round(number, row.task, row.state, row.incarnation, row.step, *versions)
                    history.setdefault(key, []).append(entry)
        ready = {}
        for change in settle(history, incarnation, progress, oldest, expected):
            rounds = self.runs[run][change.key]
            if change.state is None:
                for number in [number for number in rounds if number >= change.round]:
                    del rounds[number]
                if not rounds:
                    del self.runs[run][change.key]
                continue
            row = rounds[change.round]
            row.state, row.step = change.state, change.step
            if change.state is State.READY:
                assert row.group is not None
                ready[change.key] = row.group.oldest_version
        self.incarnations.append((run, progress.version))
        return len(self.incarnations), ready

    def issue(self, key: GroupKey, task_id: str, epoch: int, explorer: int) -> None:
        rounds, task = self.rows.get(key, {}), (task_id, epoch)
        number = max(rounds, default=-1)
        if not rounds or (rounds[number].state in ENDED and rounds[number].task != task):
            self.rows.setdefault(key, rounds)[number + 1] = Row(task, len(self.incarnations))
            return
        row = self.current(key, State.ISSUED, State.DROPPED)
        rounds[number] = Row(task, len(self.incarnations), attempts=row.attempts + 1, error=row.error)

    def ready(self, group: Group) -> None:
        row = self.current(group.key, State.ISSUED)
        if row.task[0] != group.task_id:
            raise ScheduleError
        row.state, row.group = State.READY, group

    def lease(self, keys: list[GroupKey]) -> list[Group | None]:
        rows = [self.current(key, State.READY) for key in keys]
        for row in rows:
            row.state = State.LEASED
        return [row.group for row in rows]

    def read(self, keys: list[GroupKey]) -> list[Group | None]:
        return [self.current(key, State.READY).group for key in keys]

    def release(self) -> None:
        for row in self.in_state(State.LEASED):
            row.state = State.READY

    def trained(self, step: int) -> None:
        leased = self.in_state(State.LEASED)
        if not leased:
            raise ScheduleError
        for row in leased:
            row.state, row.step = State.TRAINED, step

    def prune(self, before: int) -> None:
        run, rows = self.incarnations[-1][0], self.rows
        for key in [key for key, rounds in rows.items() if key.batch < before]:
            rounds = list(rows[key].values())
            if any(row.state is State.TRAINED and row.step is not None and row.step < before for row in rounds):
                known, groups, samples = self.pruned.get(run, [0, 0, 0])
                stored = sum(len(row.group.experiences) for row in rounds if row.group)
                self.pruned[run] = [max(known, before), groups + len(rounds), samples + stored]
                del rows[key]

    def failed(self, key: GroupKey, error: str, step: int) -> None:
        row = self.current(key, State.ISSUED)
        row.state, row.error, row.step = State.FAILED, error, step

    def filtered(self, key: GroupKey, step: int) -> None:
        row = self.current(key, State.ISSUED, State.READY, State.LEASED)
        row.state, row.step = State.FILTERED, step

    def dropped(self, key: GroupKey) -> None:
        self.current(key, State.ISSUED, State.READY, State.LEASED).state = State.DROPPED

    def dump(self) -> tuple[list[Any], ...]:
        """What :func:`dump` says of the file."""
        groups = []
        for run, keys in sorted(self.runs.items()):
            for key, rounds in sorted(keys.items()):
                for number, row in sorted(rounds.items()):
                    stored = (None, None, None, 0)
                    if row.group:
                        samples = len(row.group.experiences)
                        stored = (row.group.oldest_version, row.group.newest_version, samples, samples)
                    ours = (row.attempts, row.incarnation, row.step, row.error)
                    groups.append((run, *key, number, *row.task, row.state.value, *ours, *stored))
        incarnations = [(number, *entry) for number, entry in enumerate(self.incarnations, start=1)]
        return incarnations, [(run, *numbers) for run, numbers in sorted(self.pruned.items())], groups


def dump(ledger: Ledger) -> tuple[list[Any], ...]:
    incarnations = query(ledger, "SELECT number, run, version FROM incarnations ORDER BY number")
    pruned = query(ledger, "SELECT * FROM pruned ORDER BY run")
    groups = query(
        ledger,
        "SELECT run, batch, slot, round, task_id, epoch, state, attempts, incarnation, step, error, oldest_version,"
        " newest_version, samples, (SELECT count(*) FROM experiences e WHERE (e.run, e.batch, e.slot, e.round) ="
        " (g.run, g.batch, g.slot, g.round)) FROM groups g ORDER BY run, batch, slot, round",
    )
    return incarnations, pruned, groups


class Killed(BaseException):
    """Ends an operation as a death of the process does: nothing may handle it."""


class Troubled:
    """A connection on which something happens just before the n-th statement, counted from 0."""

    def __init__(self, connection: sqlite3.Connection, at: int, trouble: Callable[[], None]) -> None:
        self._connection = connection
        self._left = at
        self._trouble = trouble

    def _count(self, statement: str) -> None:
        if statement == "ROLLBACK":
            return
        self._left -= 1
        if self._left == -1:
            self._trouble()

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        self._count(statement)
        return self._connection.execute(statement, *values)

    def executemany(self, statement: str, rows: Any) -> sqlite3.Cursor:
        self._count(statement)
        return self._connection.executemany(statement, rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


KEYS = st.builds(GroupKey, st.integers(0, 2), st.integers(0, 1))
TASKS = st.tuples(st.sampled_from("ab"), st.integers(0, 1))
STEPS = st.integers(0, 3)
PROGRESS = st.builds(
    Progress,
    STEPS,
    st.frozensets(KEYS, max_size=2),
    st.frozensets(KEYS, max_size=2),
).map(
    lambda progress: Progress(
        progress.version,
        frozenset(key for key in progress.behind if key.batch < progress.version),
        frozenset(key for key in progress.ahead if key.batch >= progress.version),
    )
)
OPERATIONS = st.one_of(
    st.tuples(st.just("issue"), KEYS, st.sampled_from("ab"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("ready"), st.builds(make_group, KEYS, st.sampled_from("ab"), STEPS, st.integers(1, 3))),
    st.tuples(st.just("lease"), st.lists(KEYS, unique=True, max_size=3)),
    st.tuples(st.just("read"), st.lists(KEYS, unique=True, max_size=3)),
    st.tuples(st.just("release")),
    st.tuples(st.just("trained"), STEPS),
    st.tuples(st.just("prune"), STEPS),
    st.tuples(st.just("failed"), KEYS, st.just("boom"), STEPS),
    st.tuples(st.just("filtered"), KEYS, STEPS),
    st.tuples(st.just("dropped"), KEYS),
)
REOPENINGS = st.one_of(
    st.tuples(st.just("begin"), STEPS),
    st.tuples(st.just("resume"), st.integers(1, 4), PROGRESS, STEPS, st.dictionaries(KEYS, TASKS)),
)
FAULTS = ("database or disk is full", "disk I/O error", "database disk image is malformed")


class LedgerMachine(RuleBasedStateMachine):
    """Every method with any argument at any time, legal or not."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.deaths = 0
        self.model = Model()
        self.open()
        self.perform(("begin", 0))

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.deaths}.sqlite"

    @staticmethod
    def call(target: Any, operation: tuple[Any, ...]) -> Any:
        name, *values = operation
        if name == "resume":
            incarnation, progress, oldest, expected = values
            return target.resume(incarnation, progress, oldest=oldest, expected=expected.get)
        return getattr(target, name)(*values)

    def perform(self, operation: tuple[Any, ...]) -> None:
        after = copy.deepcopy(self.model)
        try:
            result = self.call(after, operation)
        except ScheduleError:
            with pytest.raises(ScheduleError):
                self.call(self.ledger, operation)
            return
        assert self.call(self.ledger, operation) == result
        self.model = after

    @rule(operation=OPERATIONS)
    def operate(self, operation: tuple[Any, ...]) -> None:
        self.perform(operation)

    @rule(operation=REOPENINGS)
    def restart(self, operation: tuple[Any, ...]) -> None:
        self.perform(operation)

    @rule(operation=OPERATIONS | REOPENINGS, at=st.integers(0, 8))
    def die(self, operation: tuple[Any, ...], at: int) -> None:
        old, before, after = self.path, dump(self.ledger), copy.deepcopy(self.model)
        self.deaths += 1

        def kill() -> None:
            copy_as_killed(old, self.path)
            raise Killed

        self.ledger._file.connection = Troubled(self.ledger._file.connection, at, kill)  # type: ignore[assignment]
        try:
            self.call(self.ledger, operation)
        except ScheduleError:
            pass
        except Killed:
            self.reopen()
            if dump(self.ledger) != before:
                self.call(after, operation)
                self.model = after
            return
        copy_as_killed(old, self.path)  # after the last statement
        self.reopen()
        try:
            self.call(self.model, operation)
        except ScheduleError:
            assert dump(self.ledger) == before

    @rule(operation=OPERATIONS | REOPENINGS, at=st.integers(0, 8), words=st.sampled_from(FAULTS))
    def fault(self, operation: tuple[Any, ...], at: int, words: str) -> None:
        connection, before = self.ledger._file.connection, dump(self.ledger)
        raised = []

        def fail() -> None:
            raised.append(words)
            raise sqlite3.OperationalError(words)

        self.ledger._file.connection = Troubled(connection, at, fail)  # type: ignore[assignment]
        caught = ""
        try:
            self.call(self.ledger, operation)
            self.call(self.model, operation)
        except ScheduleError:
            pass
        except StorageError as error:
            caught = str(error)
        self.ledger._file.connection = connection
        assert bool(raised) == bool(caught)
        if raised:
            assert words in caught and str(self.path) in caught
            assert dump(self.ledger) == before

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self.open()

    def open(self) -> None:
        self.ledger = Ledger.open(self.path)
        self.ledger._file.connection.execute("PRAGMA synchronous = OFF")  # what only a power cut would tell

    @invariant()
    def agrees(self) -> None:
        assert dump(self.ledger) == self.model.dump()
        counts = {state: len(self.model.in_state(state)) for state in State}
        assert self.ledger.counts() == counts
        ended = [
            (row.step, key, number, row.task, row.state)
            for key, rounds in self.model.rows.items()
            for number, row in rounds.items()
            if row.step is not None
        ]
        ended.sort(key=lambda entry: entry[:3])
        assert self.ledger.ended() == [(task[0], state) for *_, task, state in ended]
        assert self.ledger.ended(epoch=1) == [(task[0], state) for *_, task, state in ended if task[1] == 1]
        trained = [task[0] for *_, task, state in ended if state is State.TRAINED]
        assert self.ledger.trained_tasks() == trained


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
