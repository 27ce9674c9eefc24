"""The schedule's record of an explorer."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from lightning_rft.experience import GroupKey

__all__ = ["Member"]


@dataclass
class Member:
    """What an explorer has loaded and works on; only the schedule writes here."""

    most: float = inf  # samples at a time
    loaded: int = -1
    loading: bool = False
    alone: bool = False  # it loaded by itself, though explorers otherwise load together
    groups: dict[GroupKey, int] = field(default_factory=dict)  # -> samples that have not ended

    @property
    def load(self) -> int:
        """Samples that it works on."""
        return sum(self.groups.values())

    @property
    def room(self) -> float:
        """Samples that it could take on; negative if its last group had more than there was room for."""
        return self.most - self.load
