"""Reconciliation of a buffer with the checkpoint from which a run resumes.

The file knows what happened between the checkpoint and the end of the process, a future that will not happen now. Its
experience may still be used; its ended tasks have not ended, as they come again. :func:`settle` decides that, as a
pure function.
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
    """One round of a slot in the file; ``task`` is (task id, epoch)."""

    round: int
    task: tuple[str, int]
    state: State
    incarnation: int
    step: int | None
    oldest_version: int | None
    newest_version: int | None
    samples: int | None = None


class Change(NamedTuple):
    """The new state of a round; without one, the round and all later ones of its slot are deleted."""

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
    """Yields what must change in :func:`unsettled` groups to match a checkpoint's incarnation and progress.

    Groups in the checkpoint's weights are trained. Others are ready if their experience is of the expected task, no
    newer than the checkpoint and no older than ``oldest``, and else dropped. ``expected`` returns the task and epoch
    that the checkpoint has for a group, or None; it is asked only where it matters, as its answer may take planning.
    """
    where: dict[tuple[str, int], set[GroupKey]] = defaultdict(set)
    for key, rounds in history.items():
        for round in rounds:
            # What an earlier resume dropped belongs to a plan that no longer holds.
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

    A task that ended before the version is past, and one that ended after it is lost. At the version itself, the
    group's task tells which it is, since the slot then gets the next task.
    """
    # The rounds before the checkpoint's task did end, and the task itself did not.
    for round in rounds:
        if round.task == task:
            return round.round if round.state in ENDED else None
    ended = [round for round in rounds if round.state in ENDED and round.step is not None and round.step >= version]
    if not ended:
        return None
    # The checkpoint may know the next task before the file does. But if another slot got that task, then this slot had
    # no next task at the checkpoint.
    if task is not None and not elsewhere and rounds[-1] is ended[-1] and ended[-1].step == version:
        return None
    return ended[0].round


def current(file: File, run: int, key: GroupKey) -> Round | None:
    """The latest round of a group, None if it was never issued."""
    row = file.execute(f"SELECT {_COLUMNS} FROM groups WHERE {_KEY} ORDER BY round DESC LIMIT 1", run, *key).fetchone()
    return None if row is None else _round(row)


def unsettled(file: File, run: int, progress: Progress) -> dict[GroupKey, list[Round]]:
    """The rounds about which a checkpoint and the file may differ: of later or unended groups, and of those behind."""
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
