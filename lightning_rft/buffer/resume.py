"""What of a run's groups is still true when it goes on from a checkpoint: a pure function.

The file has seen more than the checkpoint: what came between the checkpoint and the end of the process is a future
that will not happen. Stored experience of it may still be good; endings of tasks in it are not, as those tasks come
again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_rft.buffer.schema import State
from lightning_rft.experience import GroupKey, Progress

__all__ = ["ENDED", "Change", "Round", "settle"]

ENDED = (State.FILTERED, State.FAILED)
_EXPLORED = (State.READY, State.LEASED, State.TRAINED)


class Round(NamedTuple):
    """One round of a slot as the file knows it; ``task`` is (task id, epoch)."""

    round: int
    task: tuple[str, int]
    state: State
    incarnation: int
    step: int | None
    oldest_version: int | None
    newest_version: int | None


@dataclass(frozen=True)
class Change:
    """What becomes of a group.

    Args:
        key: The group.
        round: The round that changes.
        state: What it becomes; None deletes it and those that follow.
        step: Goes with the state.
        oldest_version: Of a group that is ready.
    """

    key: GroupKey
    round: int
    state: State | None
    step: int | None = None
    oldest_version: int | None = None


def settle(
    history: Mapping[GroupKey, Sequence[Round]],
    incarnation: int,
    progress: Progress,
    oldest: int,
    expected: Callable[[GroupKey], tuple[str, int] | None],
) -> Iterator[Change]:
    """Says what must change so that the groups are as the checkpoint knows them.

    Args:
        history: The rounds, in order, of every group that is not settled: all with a batch from the version on, all
            with a step from there on, all that have not ended, and all that are behind.
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
    """The first round of a group that is not trained which belongs to the lost future, None if there is none.

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
