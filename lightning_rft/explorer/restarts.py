"""Which of the explorers that died are started again, and when."""

from __future__ import annotations

from collections import defaultdict, deque

__all__ = ["Restarts"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class Restarts:
    """Counts the deaths in each slot, so that one event that ends many explorers is one death for each.

    Args:
        maximum: Deaths in one slot within ``window_s`` that are survived.
        window_s: Seconds after which a death is forgotten.

    Example:
        >>> restarts = Restarts(maximum=1, window_s=600)
        >>> restarts.died(slot=0, now=0), restarts.died(slot=1, now=0), restarts.due(now=1)
        (True, True, [0, 1])
        >>> restarts.died(slot=0, now=9)
        False
    """

    def __init__(self, maximum: int, window_s: float) -> None:
        #: How often an explorer was started again, in all.
        self.total = 0
        self._maximum = maximum
        self._window_s = window_s
        self._deaths: defaultdict[int, deque[float]] = defaultdict(deque)
        self._vacant: dict[int, float] = {}  # slot -> when to start a process again
        #: Whether starts have to wait.
        self.held = False

    def spent(self, slot: int, now: float) -> bool:
        """Whether the next death in a slot is one too many."""
        deaths = self._deaths[slot]
        while deaths and deaths[0] < now - self._window_s:
            deaths.popleft()
        return len(deaths) >= self._maximum

    @property
    def vacant(self) -> int:
        """Number of slots in which a process is yet to be started."""
        return len(self._vacant)

    def died(self, slot: int, now: float) -> bool:
        """Plans a restart, after a pause that doubles with every death there; ``False`` if it was one too many."""
        if self.spent(slot, now):
            return False
        deaths = self._deaths[slot]
        self.total += 1
        self._vacant[slot] = now + min(_FIRST_PAUSE_S * 2 ** len(deaths), _LONGEST_PAUSE_S)
        deaths.append(now)
        return True

    def due(self, now: float) -> list[int]:
        """Slots in which to start a process now; each is told once."""
        due = {slot: when for slot, when in self._vacant.items() if when <= now}
        for slot in due:
            del self._vacant[slot]
        if self.held:  # asked only now, so that another thread that has them wait sees those that are told as taken
            self._vacant |= due
            return []
        return list(due)

    def clear(self) -> None:
        """Forgets all deaths, and that starts have to wait."""
        self.held = False
        self._deaths.clear()
        self._vacant.clear()
