"""The actions that the schedule asks for."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_rft.experience import GroupKey

__all__ = ["Action", "Drop", "Issue", "Lease", "Load", "Push"]


@dataclass(frozen=True)
class Issue:
    """Explore ``group`` on ``explorer``, going on with what is kept of it that is no older than version ``oldest``."""

    group: GroupKey
    explorer: int
    oldest: int = field(default=-1, compare=False)


@dataclass(frozen=True)
class Lease:
    """Hand ``groups``, which make up ``batch``, to the trainer."""

    batch: int
    groups: tuple[GroupKey, ...]


@dataclass(frozen=True)
class Push:
    """Push ``version`` now."""

    version: int


@dataclass(frozen=True)
class Load:
    """Have ``explorer`` load ``version`` or a newer one.

    If pushes happen in the background, it loads at once. If the trainer waits for every push, the explorer has come
    after one, and gets weights alone when the trainer next waits or is between two steps.
    """

    explorer: int
    version: int


@dataclass(frozen=True)
class Drop:
    """Forget ``group``, which is too old and is issued again; ``explorer`` works on it, if any."""

    group: GroupKey
    explorer: int | None


Action = Issue | Lease | Push | Load | Drop
