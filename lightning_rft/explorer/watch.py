"""Which explorers have work and get nowhere with it: a process that is alive may hang all the same."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Watch"]


@dataclass
class _State:
    """How many answers one explorer owes, and when it last came further."""

    owed: int = 0
    since: float = 0.0


class Watch:
    """Keeps, for each explorer, what it was asked and has not answered, and when there last was progress.

    Knows no clock: it is told the time, in seconds.

    Args:
        timeout_s: Seconds without progress after which an explorer that owes an answer is overdue.

    Example:
        >>> watch = Watch(timeout_s=10)
        >>> watch.asked(0, now=0)
        >>> watch.advanced(0, now=7)
        >>> watch.overdue(now=12), watch.overdue(now=18)
        ([], [0])
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._states: dict[int, _State] = {}

    def asked(self, explorer: int, now: float) -> None:
        """It owes one more answer; if it owed none, its time begins now."""
        state = self._states.setdefault(explorer, _State())
        if state.owed == 0:
            state.since = now
        state.owed += 1

    def answered(self, explorer: int, now: float) -> None:
        """It owes one less, or was told to forget it: progress."""
        state = self._states.get(explorer)
        if state is not None:
            state.owed = max(0, state.owed - 1)
            state.since = now

    def advanced(self, explorer: int, now: float) -> None:
        """It has come further."""
        if explorer in self._states:
            self._states[explorer].since = now

    def gone(self, explorer: int) -> None:
        """It is dead, or was told to forget everything."""
        self._states.pop(explorer, None)

    def overdue(self, now: float) -> list[int]:
        """Those that owe an answer and have not come further for ``timeout_s``."""
        return [
            explorer for explorer, state in self._states.items() if state.owed and now - state.since > self.timeout_s
        ]
