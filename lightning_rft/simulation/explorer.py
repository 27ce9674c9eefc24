"""An explorer on a fake clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

from lightning_rft.experience import GroupKey
from lightning_rft.simulation.clock import Clock

__all__ = ["SimulatedExplorer", "Work"]


@dataclass(eq=False)
class Work:
    """One attempt at a group."""

    group: GroupKey
    explorer: int
    attempt: int
    version: int  #: Loaded when the group was issued, then when its first sample began.
    left: int  #: Samples that have not ended.
    begun: bool = False


class SimulatedExplorer:
    """Runs as many samples at once as it has room for; the others wait in its queue, as in an engine."""

    def __init__(self, clock: Clock, room: int | None, ended: Callable[[Work], None]) -> None:
        self.loaded = -1
        self._clock = clock
        self._room = inf if room is None else room
        self._ended = ended
        self._held_s = 0.0  # seconds that it stood still in all
        self._queue: deque[tuple[Work, float]] = deque()  # samples that wait, with their seconds
        self._sampling: list[Work] = []  # one entry per running sample

    def add(self, work: Work, seconds: Sequence[float]) -> None:
        """Takes the samples of a group."""
        self._queue += [(work, length) for length in seconds]
        self._begin()

    def forget(self, work: Work) -> None:
        """Gives a group up."""
        self._queue = deque((other, seconds) for other, seconds in self._queue if other is not work)
        self._sampling = [other for other in self._sampling if other is not work]
        self._begin()

    def hold(self, seconds: float) -> None:
        """Stands still, so that whatever it samples ends later."""
        self._held_s += seconds

    def die(self) -> None:
        """Gives everything up."""
        self._queue.clear()
        self._sampling.clear()

    def _begin(self) -> None:
        while self._queue and len(self._sampling) < self._room:
            work, seconds = self._queue.popleft()
            if not work.begun:
                work.version, work.begun = self.loaded, True
            self._sampling.append(work)
            self._clock.after(seconds, partial(self._end, work, self._held_s))

    def _end(self, work: Work, held_s: float) -> None:
        if self._held_s > held_s:
            self._clock.after(self._held_s - held_s, partial(self._end, work, self._held_s))
        elif work in self._sampling:  # else it was given up
            self._sampling.remove(work)
            work.left -= 1
            self._begin()
            self._ended(work)
