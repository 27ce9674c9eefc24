"""The sleep of an engine: what of its GPUs' memory it has given back, and what it must not be asked meanwhile."""

from __future__ import annotations

from collections.abc import Collection

from lightning_rft.errors import ScheduleError

__all__ = ["DROPS", "KEEPS", "PARTS", "WEIGHTS", "Sleeping"]

#: What an engine's memory is made of, in vLLM's names.
PARTS = ("weights", "kv_cache")
WEIGHTS = PARTS[:1]
#: Levels of sleep, in vLLM's numbers: the weights go to the CPU's memory, or are gone until the next push.
KEEPS, DROPS = 1, 2


class Sleeping:
    """Tracks what of an engine sleeps, and refuses what needs it.

    Example:
        >>> sleeping = Sleeping()
        >>> sleeping.begin(DROPS, busy=False)
        >>> sleeping.end(WEIGHTS)
        ['weights']
        >>> sleeping.check("load", WEIGHTS, version=0)
        >>> sleeping.check("step", PARTS, version=0)
        Traceback (most recent call last):
        ...
        lightning_rft.errors.ScheduleError: an engine was asked to step while its kv_cache sleeps: wake it first
    """

    def __init__(self) -> None:
        #: What sleeps.
        self.parts: frozenset[str] = frozenset()
        self._dropped = False

    def begin(self, level: int, *, busy: bool) -> None:
        """Falls asleep; ScheduleError for an engine that is ``busy`` or sleeps already."""
        if level not in (KEEPS, DROPS):
            raise ScheduleError(f"sleep(level={level}): {KEEPS} keeps the weights, {DROPS} drops them")
        if busy or self.parts:
            raise ScheduleError(f"an engine was told to sleep while it {'has work' if busy else 'sleeps'}")
        self.parts, self._dropped = frozenset(PARTS), self._dropped or level == DROPS

    def end(self, parts: Collection[str]) -> list[str]:
        """Wakes some parts; returns those that slept."""
        if unknown := set(parts) - set(PARTS):
            raise ScheduleError(f"an engine has no {', '.join(sorted(unknown))} to wake: it has {' and '.join(PARTS)}")
        woken = [part for part in PARTS if part in parts and part in self.parts]
        self.parts -= set(woken)
        return woken

    def check(self, what: str, needed: Collection[str], *, version: int) -> None:
        """Raises ScheduleError if what is needed sleeps, or weights are that were dropped and not loaded again.

        ``version`` is that of the weights, -1 if none were loaded since.
        """
        asleep = [part for part in PARTS if part in needed and part in self.parts]
        if asleep:
            raise ScheduleError(f"an engine was asked to {what} while its {' and '.join(asleep)} sleeps: wake it first")
        self._dropped = self._dropped and version < 0
        if self._dropped and what != "load":
            raise ScheduleError(f"an engine was asked to {what} without weights: its sleep dropped them, so push first")
