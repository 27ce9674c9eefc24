"""What the schedule asks for."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rft.experience import GroupKey

__all__ = ["Action", "Drop", "Issue", "Lease", "Load", "Push"]


@dataclass(frozen=True)
class Issue:
    """Explore ``group`` on ``explorer``."""

    group: GroupKey
    explorer: int


@dataclass(frozen=True)
class Lease:
    """These groups make up ``batch``, which the trainer wants: hand them over."""

    batch: int
    groups: tuple[GroupKey, ...]


@dataclass(frozen=True)
class Push:
    """Version ``version`` is due, and nothing that older weights must explore is still open: push it now."""

    version: int


@dataclass(frozen=True)
class Load:
    """Have ``explorer`` load ``version``, or a newer one: what is pushed by then or, alone, what the trainer has.

    Where pushes happen in the background, that is at once. Where the trainer waits for every push, the explorer has
    come after one, and gets weights alone: as soon as the trainer waits, for experience or to push, or is between two
    steps.
    """

    explorer: int
    version: int


@dataclass(frozen=True)
class Drop:
    """Forget ``group``, which is too old by now; it is issued again. ``explorer`` works on it, or nobody."""

    group: GroupKey
    explorer: int | None


Action = Issue | Lease | Push | Load | Drop
