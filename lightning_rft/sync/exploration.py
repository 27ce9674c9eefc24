"""Exploring without training: the schedule's rule where no weights come after those that there are."""

from __future__ import annotations

import sys

from lightning_rft.sync.rule import Rule

__all__ = ["Exploration"]


class Exploration(Rule):
    """Every batch may be explored at once, with the weights of the start, and none are ever published after them."""

    @property
    def max_staleness(self) -> int:
        """No bound: nothing is trained."""
        return sys.maxsize

    def admit(self, batch: int) -> int:
        """Any version will do."""
        return 0

    def publishes_after(self, batch: int) -> bool:
        """Never."""
        return False
