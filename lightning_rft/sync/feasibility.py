"""Arithmetic of steps: which step trains a group, and whether that is in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from lightning_rft.errors import ScheduleError
from lightning_rft.experience import GroupKey, Progress

__all__ = ["best_groups", "moved_groups", "would_be_late"]


def moved_groups(progress: Progress, size: Callable[[int], int]) -> dict[GroupKey, int]:
    """The steps of the groups that are not trained in the step of their own batch; ScheduleError if there can be none.

    Each step takes the groups that are left in order, as many as its batch has (``size``). Those of earlier batches
    come first and shift others to later steps, until as many groups are skipped that are trained already.

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
    """Whether a step without these groups leaves too little room to train them before they are too old.

    ``waiting`` are the versions of groups that have come back and are left out, ``unfinished`` those of groups that
    have not come back; only the latter are worth a wait. A group of version ``v`` is due by step ``v + bound``. Of all
    groups due by step ``d``, those for which the steps after this one up to ``d`` have no room must be in this one.
    That is at most a batch of groups, because a group of batch ``b`` is never due before step ``b``.

    Example:
        >>> would_be_late([], [3, 3], bound=2, step=4, room=lambda step: 1)
        True
        >>> would_be_late([], [3, 3], bound=3, step=4, room=lambda step: 1)
        False
    """
    left = [*waiting, *unfinished]
    return any(
        sum(version + bound <= due for version in left) > places
        for due, places in _places({version + bound for version in unfinished}, step, room)
    )


def best_groups(
    ready: Mapping[GroupKey, int],
    unfinished: Iterable[int],
    scores: Mapping[GroupKey, float],
    *,
    bound: int,
    step: int,
    room: Callable[[int], int],
) -> list[GroupKey]:
    """The ready groups (-> version) with the highest scores that a step can train without making another too old.

    Returns ``room(step)`` groups, the oldest first; a missing score is 0. Some groups must be in this step (see
    :func:`would_be_late`). These demands are nested, so taking the best group that every demand permits, one by one,
    gives the highest scores possible. Without scores it takes the oldest, which meet every demand that can be met: a
    wait that suffices for them suffices for any choice made here.

    Example:
        >>> ready = {GroupKey(0, slot): slot for slot in range(3)}
        >>> best_groups(ready, [], {GroupKey(0, 2): 0.5}, bound=2, step=1, room=lambda step: 1)
        [GroupKey(batch=0, slot=2)]
        >>> best_groups(ready, [], {GroupKey(0, 2): 0.5}, bound=2, step=2, room=lambda step: 1)
        [GroupKey(batch=0, slot=0)]
    """
    size = room(step)
    oldest = sorted(ready, key=lambda group: (ready[group], group))
    versions = [*ready.values(), *unfinished]
    spare: dict[int, int] = {}  # due -> how many groups due later this step may take
    for due, places in _places({version + bound for version in versions}, step, room):
        demand = sum(version + bound <= due for version in versions) - places
        at_hand = sum(version + bound <= due for version in ready.values())
        spare[due] = size - max(0, min(demand, at_hand, size))
    chosen: set[GroupKey] = set()
    for group in sorted(oldest, key=lambda group: -scores.get(group, 0.0)):  # stable: of equal ones the oldest first
        earlier = [due for due in spare if due < ready[group] + bound]
        if len(chosen) < size and all(spare[due] for due in earlier):
            chosen.add(group)
            for due in earlier:
                spare[due] -= 1
    return [group for group in oldest if group in chosen]


def _places(dues: Iterable[int], step: int, room: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Yields each due step in order, with the number of groups that the steps after ``step`` up to it train."""
    places = 0
    for due in sorted(dues):
        while step < due and room(step + 1):
            step += 1
            places += room(step)
        yield due, places
