"""A fake clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from math import inf

__all__ = ["Clock"]


class Clock:
    """A clock that jumps to whatever happens next."""

    def __init__(self, now: float) -> None:
        self.now = now
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time: float, happen: Callable[[], None]) -> None:
        """Plans something, unless its time has passed."""
        if time >= self.now:
            heapq.heappush(self._agenda, (time, next(self._order), happen))

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        """Plans something some seconds from now."""
        self.at(self.now + seconds, happen)

    @property
    def next(self) -> float:
        """When something happens next; infinity for never."""
        return self._agenda[0][0] if self._agenda else inf

    def jump(self) -> None:
        """Lets the next thing happen."""
        self.now, _, happen = heapq.heappop(self._agenda)
        happen()
