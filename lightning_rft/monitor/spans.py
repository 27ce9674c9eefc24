"""What the processes of a run did when: the record of it, and how the time was spent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Interval", "Span", "idle", "position", "union"]

Interval = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """Something that a process did for a while.

    Args:
        track: Who: ``"trainer"``, ``"buffer"``, ``"explorer 0"``, ``"explorer 1"``, ...
        what: ``"rollout"`` (one group), ``"put"``, ``"train"``, ``"sync"`` (a collective), ``"load"`` (an explorer's
            half of one), ``"write checkpoint"``, ``"load checkpoint"`` or ``"wait"``.
        begin: Seconds of :func:`time.monotonic`.
        end: Likewise.
        batch: The batch that it is about, if it is about one.
        version: The version of the weights, if it is about one.
        detail: What a ``"wait"`` is for: ``"experience"``, ``"weights"``, ``"room"`` or ``"push"``.
    """

    track: str
    what: str
    begin: float
    end: float
    batch: int | None = None
    version: int | None = None
    detail: str = ""

    @property
    def cause(self) -> str:
        """What time was spent on: ``"train"``, ``"wait for experience"``."""
        return f"{self.what} for {self.detail}" if self.what == "wait" and self.detail else self.what

    @property
    def name(self) -> str:
        """What it is called in a trace: ``"train 3"``, ``"sync v4"``."""
        if self.batch is not None:
            return f"{self.cause} {self.batch}"
        return self.cause if self.version is None else f"{self.cause} v{self.version}"


def idle(spans: Iterable[Span], begin: float, end: float) -> dict[str, dict[str, float]]:
    """Where the time between ``begin`` and ``end`` went.

    Args:
        spans: What was recorded, in any order.
        begin: Seconds of :func:`time.monotonic`.
        end: Likewise.

    Returns:
        Track -> cause (see :attr:`Span.cause`) -> seconds. What one track does several times at once, such as rollouts
        of several groups, counts once. Causes of one track may overlap.

    Example:
        >>> train, wait = Span("trainer", "train", 1.0, 3.0), Span("trainer", "wait", 3.0, 9.0, detail="experience")
        >>> idle([train, wait], 0.0, 5.0)
        {'trainer': {'train': 2.0, 'wait for experience': 2.0}}
    """
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for span in spans:
        if span.begin < end and span.end > begin:
            interval = max(begin, span.begin), min(end, span.end)
            found.setdefault(span.track, {}).setdefault(span.cause, []).append(interval)
    return {
        track: {cause: sum(last - first for first, last in union(intervals)) for cause, intervals in causes.items()}
        for track, causes in found.items()
    }


def union(intervals: Iterable[Interval], gap: float = 0.0) -> list[Interval]:
    """What intervals cover together, in order; holes up to ``gap`` are closed.

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
    """Sorts tracks from top to bottom: explorers by number, the buffer, the trainer."""
    name, _, number = track.partition(" ")
    return {"buffer": 1, "trainer": 2}.get(name, 0), name, int(number) if number.isdigit() else 0
