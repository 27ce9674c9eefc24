"""The rounds of a run's groups, as the file tells them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lightning_rft.buffer.database import File
from lightning_rft.buffer.resume import Change, Round
from lightning_rft.buffer.schema import State
from lightning_rft.experience import GroupKey, Progress

__all__ = ["ROUND", "apply", "current", "unsettled"]

_KEY = "run = ? AND batch = ? AND slot = ?"
ROUND = f"{_KEY} AND round = ?"
_COLUMNS = "round, task_id, epoch, state, incarnation, step, oldest_version, newest_version"


def current(file: File, run: int, key: GroupKey) -> Round | None:
    """The current round of a group, None if it was never issued."""
    row = file.execute(f"SELECT {_COLUMNS} FROM groups WHERE {_KEY} ORDER BY round DESC LIMIT 1", run, *key).fetchone()
    return None if row is None else _round(row)


def unsettled(file: File, run: int, progress: Progress) -> dict[GroupKey, list[Round]]:
    """The rounds that a checkpoint may see otherwise than the file: not the whole history."""
    rows = file.execute(
        f"SELECT batch, slot, {_COLUMNS} FROM groups"
        " WHERE run = ? AND (batch >= ? OR step >= ? OR step IS NULL) ORDER BY batch, slot, round",
        *(run, progress.version, progress.version),
    )
    found = {GroupKey(*key): [_round(row[2:]) for row in rounds] for key, rounds in groupby(rows, lambda row: row[:2])}
    for key in progress.behind:
        rounds = [_round(row) for row in file.execute(f"SELECT {_COLUMNS} FROM groups WHERE {_KEY}", run, *key)]
        if rounds:
            found[key] = rounds
    return found


def apply(file: File, run: int, change: Change) -> None:
    """Makes a change, inside a transaction."""
    at = (run, *change.key, change.round)
    if change.state is not None:
        file.execute(f"UPDATE groups SET state = ?, step = ? WHERE {ROUND}", change.state.value, change.step, *at)
        return
    for table in ("experiences", "groups"):
        file.execute(f"DELETE FROM {table} WHERE {_KEY} AND round >= ?", *at)


def _round(row: Sequence[Any]) -> Round:
    number, task_id, epoch, state, *rest = row
    return Round(number, (task_id, epoch), State(state), *rest)
