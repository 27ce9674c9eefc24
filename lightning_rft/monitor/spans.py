"""Spans: records of what a run's processes did when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Interval", "Span", "position", "union"]

Interval = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """One thing that a process did, from ``begin`` to ``end`` in seconds of :func:`time.monotonic`."""

    #: ``"trainer"``, ``"buffer"``, ``"explorer 0"``, ``"explorer 1"``, ...
    track: str
    #: ``"rollout"`` (one group), ``"put"``, ``"train"``, ``"sync"`` (a collective), ``"load"`` (an explorer's half of
    #: one), ``"write checkpoint"``, ``"load checkpoint"`` or ``"wait"``.
    what: str
    begin: float
    end: float
    batch: int | None = None
    version: int | None = None
    #: What a ``"wait"`` is for: ``"experience"``, ``"weights"``, ``"room"`` or ``"push"``.
    detail: str = ""

    @property
    def cause(self) -> str:
        """What the time was spent on: ``"train"``, ``"wait for experience"``."""
        return f"{self.what} for {self.detail}" if self.what == "wait" and self.detail else self.what

    @property
    def name(self) -> str:
        """Name in a trace: ``"train 3"``, ``"sync v4"``."""
        if self.batch is not None:
            return f"{self.cause} {self.batch}"
        return self.cause if self.version is None else f"{self.cause} v{self.version}"


def union(intervals: Iterable[Interval], gap: float = 0.0) -> list[Interval]:
    """The union of intervals, in order, with holes up to ``gap`` closed.

    Example:
        >>> union([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0)])
        [(0.0, 3.0), (4.0, 5.0)]
    """
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1] + gap:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def position(track: str) -> tuple[int, str, int]:
    """A key that sorts tracks from top to bottom: explorers by number, buffer, trainer."""
    name, _, number = track.partition(" ")
    return {"buffer": 1, "trainer": 2}.get(name, 0), name, int(number) if number.isdigit() else 0
