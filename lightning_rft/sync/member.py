"""One explorer as the schedule knows it: what it loaded, what it works on and what it has room for."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from lightning_rft.experience import GroupKey

__all__ = ["Member"]


@dataclass
class Member:
    """The state of one explorer; only the schedule writes here."""

    most: float = inf
    loaded: int = -1
    loading: bool = False
    alone: bool = False  # whether it loaded by itself where the others load together
    groups: dict[GroupKey, int] = field(default_factory=dict)  # with the number of samples that have not ended

    @property
    def load(self) -> int:
        """How many samples it works on."""
        return sum(self.groups.values())

    @property
    def room(self) -> float:
        """How many more samples it could work on; negative where the last group had more than there was room for."""
        return self.most - self.load
