"""Groups to store, and what a ledger holds, for the tests of this folder."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.experience import Experience, Group, GroupKey, Turn


def make_group(key: GroupKey, task_id: str, version: int = 0, samples: int = 2) -> Group:
    turns = (
        Turn((1, 2), (3,), (-0.5,), (version + 1,), "stop"),
        Turn((1, 2, 3), (4, 5), (-0.125, float("-inf")), (version, version + 1), "length", temperature=0.5),
    )
    parts = {"format": 0.5}
    experiences = (
        Experience(task_id, i, turns, i / 3, "text é", 1.5, 0.1, parts, {"calls": float(i)}) for i in range(samples)
    )
    return Group(key, task_id, tuple(experiences))


def bring(ledger: Ledger, key: GroupKey, state: State, task_id: str = "task", version: int = 0, step: int = 0) -> None:
    """Takes a new group to a state by the shortest way."""
    ledger.issue(key, task_id, 0, 0)
    if state in (State.READY, State.LEASED, State.TRAINED, State.FILTERED):
        ledger.ready(make_group(key, task_id, version))
    if state in (State.LEASED, State.TRAINED):
        ledger.lease([key])
    if state is State.TRAINED:
        ledger.trained(step)
    if state is State.FAILED:
        ledger.failed(key, "boom", step)
    if state is State.FILTERED:
        ledger.filtered(key, step)
    if state is State.DROPPED:
        ledger.dropped(key)


def query(ledger: Ledger, question: str, *values: Any) -> list[tuple[Any, ...]]:
    return ledger._file.ask(question, *values)


def dump(ledger: Ledger) -> list[str]:
    return list(ledger._file.connection.iterdump())


def copy_as_killed(path: Path, copy: Path) -> None:
    """The files as a process that is killed now leaves them: the log not yet merged into the database."""
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")


def as_format_3(path: Path) -> None:
    """Makes a closed file what the version before metrics wrote."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("ALTER TABLE experiences DROP COLUMN metrics; PRAGMA user_version = 3;")
