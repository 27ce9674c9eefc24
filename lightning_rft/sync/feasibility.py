"""Arithmetic of steps and the room that they have: which group is trained when, and whether that is in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lightning_rft.errors import ScheduleError
from lightning_rft.experience import GroupKey, Progress

__all__ = ["moved_groups", "would_be_late"]


def moved_groups(progress: Progress, size: Callable[[int], int]) -> dict[GroupKey, int]:
    """The step by which each group has its turn, for those where that is not the step of its own batch.

    Steps take what is left in order, as many groups as their batch has. Groups that are left from earlier batches come
    first and shift the others to later steps, until as many were passed that are trained already.

    Args:
        progress: What is part of the weights.
        size: Number of groups of a batch.

    Returns:
        Group -> step, never earlier than the group's batch.

    Raises:
        ScheduleError: This cannot be what some steps have trained.

    Example:
        >>> progress = Progress(5, behind=frozenset({GroupKey(4, 0)}), ahead=frozenset({GroupKey(6, 1)}))
        >>> for group, step in moved_groups(progress, lambda batch: 2).items():
        ...     print(tuple(group), step)
        (4, 0) 5
        (5, 1) 6
    """
    first, behind, ahead = progress.version, progress.behind, progress.ahead
    misplaced = {key for key in behind if key.batch >= first} | {key for key in ahead if key.batch < first}
    if misplaced or len(behind) != len(ahead):
        raise ScheduleError(
            f"{len(behind)} groups behind and {len(ahead)} ahead of version {first} cannot be: every step trains as "
            "many groups as its batch has"
        )
    moved: dict[GroupKey, int] = {}
    queue = sorted(behind)
    for step in range(first, max((key.batch for key in ahead), default=first - 1) + 1):
        queue += [key for slot in range(size(step)) if (key := GroupKey(step, slot)) not in ahead]
        moved |= {key: step for key in queue[: size(step)] if key.batch != step}
        queue = queue[size(step) :]
    return moved


def would_be_late(
    waiting: Iterable[int], unfinished: Sequence[int], *, bound: int, step: int, room: Callable[[int], int]
) -> bool:
    """Whether a step without these groups would leave them too little room to be trained before they are too old.

    A group of version ``v`` is trained by step ``v + bound`` at the latest. Of all those that are due by step ``d``,
    the steps after this one up to ``d`` have room for so many; the rest must be in this one. At most a batch of groups
    is ever missed, because a group of batch ``b`` is never due before step ``b``.

    Args:
        waiting: Versions of the groups that have come back and are left out.
        unfinished: Versions of those that have not come back; only they are worth a wait.
        bound: Most batches that a token may lag behind.
        step: The step.
        room: Number of groups that a later step trains; 0 where there is none.

    Example:
        >>> would_be_late([], [3, 3], bound=2, step=4, room=lambda step: 1)
        True
        >>> would_be_late([], [3, 3], bound=3, step=4, room=lambda step: 1)
        False
    """
    left = [*waiting, *unfinished]
    places = 0
    for due in sorted({version + bound for version in unfinished}):
        while step < due and room(step + 1):
            step += 1
            places += room(step)
        if sum(version + bound <= due for version in left) > places:
            return True
    return False
