"""The places of a pool's explorers: which are vacant, since when, and what takes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_rft.errors import DeadlineError
from lightning_rft.explorer.launcher import Handle, Launcher, Place
from lightning_rft.explorer.messages import Started
from lightning_rft.explorer.restarts import Restarts

__all__ = ["Places"]


class Places:
    """Has ``launcher`` start a process in every vacant place, those again whose explorer died.

    A launcher that waits for explorers to come leaves places vacant. A run begins when all are taken; later it goes on
    without those that are vacant, as long as one is not. Knows no clock: ``now`` is :func:`time.monotonic`.
    """

    def __init__(self, launcher: Launcher, restarts: Restarts) -> None:
        self._launcher = launcher
        self._restarts = restarts
        self._all: Sequence[Place] = ()
        self._vacant: dict[int, float] = {}  # slot that nobody takes yet -> when that is too late
        #: By slot: what its engine is, once one came up.
        self.came_up: dict[int, Started] = {}
        self._patience_s = math.inf

    def open(self, folder: Path, places: Sequence[Place]) -> None:
        """Gets ready to fill these places, all of which are vacant."""
        self._launcher.open(folder, len(places))
        self._all = places
        self._vacant = dict.fromkeys(range(len(places)), math.inf)

    def close(self) -> None:
        """Forgets all places and deaths."""
        self._restarts.clear()
        self.came_up.clear()
        self._vacant.clear()
        self._all, self._patience_s = (), math.inf

    def begin(self, patience_s: float, now: float) -> None:
        """Sets how long a place may stay vacant, from now on."""
        self._patience_s = patience_s
        self._vacant = dict.fromkeys(self._vacant, now + patience_s)

    def fill(self, now: float) -> Iterator[tuple[int, Handle]]:
        """Yields the slots that are taken now, and by what."""
        for slot in self._restarts.due(now):
            self._vacant[slot] = now + self._patience_s
        for slot in list(self._vacant):
            process = self._launcher.launch(self._all[slot])
            if process is not None:
                del self._vacant[slot]
                yield slot, process

    def died(self, slot: int, now: float) -> bool:
        """Plans another process for a place; ``False`` if this was one death too many."""
        return self._restarts.died(slot, now)

    @property
    def needed(self) -> int:
        """How many engines must be up: all, but for places that have become vacant, and at least one."""
        vacated = sum(slot in self.came_up for slot in list(self._vacant))  # another thread may be filling them
        return max(1, len(self._all) - vacated)

    def check(self, now: float, limit: str) -> None:
        """Raises :class:`DeadlineError` if places that a run needs stay vacant; ``limit`` is the setting for that."""
        first = [too_late for slot, too_late in self._vacant.items() if slot not in self.came_up]
        nobody = len(self._vacant) == len(self._all)
        if any(too_late < now for too_late in first) or (nobody and max(self._vacant.values(), default=now) < now):
            taken = len(self._all) - len(self._vacant)
            raise DeadlineError(
                f"explorers have taken {taken} of {len(self._all)} places within {limit}: {self._launcher.missing}"
            )
