"""Reconciliation of a buffer with a checkpoint: what of a run's groups still holds when it resumes.

The file has seen more than the checkpoint: what came between the checkpoint and the end of the process is a future
that will not happen. Stored experience of it may still be good; endings of tasks in it are not, as those tasks come
again. :func:`settle` decides that as a pure function; the others read and change the rounds in the file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lightning_rft.buffer.database import File
from lightning_rft.buffer.schema import State
from lightning_rft.experience import GroupKey, Progress

__all__ = ["ENDED", "ROUND", "Change", "Round", "apply", "current", "settle", "unsettled"]

ENDED = (State.FILTERED, State.FAILED)
_EXPLORED = (State.READY, State.LEASED, State.TRAINED)

_KEY = "run = ? AND batch = ? AND slot = ?"
ROUND = f"{_KEY} AND round = ?"
_COLUMNS = "round, task_id, epoch, state, incarnation, step, oldest_version, newest_version, samples"


class Round(NamedTuple):
    """One round of a slot as the file knows it; ``task`` is (task id, epoch)."""

    round: int
    task: tuple[str, int]
    state: State
    incarnation: int
    step: int | None
    oldest_version: int | None
    newest_version: int | None
    samples: int | None = None


class Change(NamedTuple):
    """The new state of a round and its step, if any; without a state, the round and those after it are deleted."""

    key: GroupKey
    round: int
    state: State | None
    step: int | None = None
    oldest_version: int | None = None  # of a group that is ready


def settle(
    history: Mapping[GroupKey, Sequence[Round]],
    incarnation: int,
    progress: Progress,
    oldest: int,
    expected: Callable[[GroupKey], tuple[str, int] | None],
) -> Iterator[Change]:
    """Yields what must change so that the groups are as the checkpoint of this incarnation and progress knows them.

    Args:
        history: The rounds, in order, of every group that :func:`unsettled` names.
        incarnation: Of the checkpoint.
        progress: Of the checkpoint.
        oldest: The oldest version that a token may have.
        expected: The task and epoch that the checkpoint means for a group, None if it knows of none. Asked only where
            it matters, so that a plan need not be drawn up for the whole lost future.
    """
    where: dict[tuple[str, int], set[GroupKey]] = defaultdict(set)
    for key, rounds in history.items():
        for round in rounds:
            # What an earlier resume dropped tells of a plan that no longer holds.
            if round.state is not State.DROPPED or round.incarnation >= incarnation:
                where[round.task].add(key)
    version = progress.version
    for key, rounds in history.items():
        last = rounds[-1]
        if progress.trained(key):
            # The file may know less than the checkpoint: a power cut takes the last moments.
            if last.state not in ENDED and (last.step is None or last.step >= version):
                yield Change(key, last.round, State.TRAINED, step=version - 1)
            continue
        usable = (
            last.state in _EXPLORED
            and last.oldest_version is not None
            and last.newest_version is not None
            and oldest <= last.oldest_version
            and last.newest_version <= version
        )
        doubtful = any(round.state in ENDED and round.step == version for round in rounds)
        task = expected(key) if usable or doubtful else None
        lost = _lost(rounds, version, task, elsewhere=bool(task and where[task] - {key}))
        if lost is not None:
            yield Change(key, lost, None)
        elif last.state in ENDED:
            continue
        elif usable and last.task == task:
            yield Change(key, last.round, State.READY, oldest_version=last.oldest_version)
        else:
            yield Change(key, last.round, State.DROPPED)


def _lost(rounds: Sequence[Round], version: int, task: tuple[str, int] | None, elsewhere: bool) -> int | None:
    """The first round of an untrained group that belongs to the lost future, None if there is none.

    An ending before the version is of the past and one after it is lost; of one at the version, the group's task says
    on which side of the checkpoint it was, since each ending gives the slot the next task.
    """
    # What came before the task that the checkpoint knows is true, and that the task itself ended is not.
    for round in rounds:
        if round.task == task:
            return round.round if round.state in ENDED else None
    ended = [round for round in rounds if round.state in ENDED and round.step is not None and round.step >= version]
    if not ended:
        return None
    # The checkpoint may know of the next task before the file does. But if that task was given to another slot, then
    # this slot had none yet at the checkpoint, and got its own only because others had used up more of them.
    if task is not None and not elsewhere and rounds[-1] is ended[-1] and ended[-1].step == version:
        return None
    return ended[0].round


def current(file: File, run: int, key: GroupKey) -> Round | None:
    """The current round of a group, None if it was never issued."""
    row = file.execute(f"SELECT {_COLUMNS} FROM groups WHERE {_KEY} ORDER BY round DESC LIMIT 1", run, *key).fetchone()
    return None if row is None else _round(row)


def unsettled(file: File, run: int, progress: Progress) -> dict[GroupKey, list[Round]]:
    """The rounds that a checkpoint may see differently than the file does.

    Those of groups with a batch or a step from its version on, of groups that have not ended, and of those behind.
    """
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
