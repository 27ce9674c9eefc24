"""What trainer and explorers are at: added up for the figures of a run, and told as spans to whoever looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from lightning_rft.monitor.idle import Idle
from lightning_rft.monitor.spans import Span

__all__ = ["Activity"]


class Activity:
    """Records who did what from when on, until now. Not thread-safe, but for :meth:`observe`.

    Args:
        observers: Called with every span of the timeline.
    """

    def __init__(self, observers: Sequence[Callable[[Span], None]]) -> None:
        self._observers = observers
        self._idle = Idle()

    def observe(
        self,
        track: str,
        what: str,
        began: float,
        version: int | None = None,
        batch: int | None = None,
        detail: str = "",
    ) -> None:
        """Records what took from ``began`` (``time.monotonic()``) until now."""
        if self._observers:
            span = Span(track, what, began, time.monotonic(), batch=batch, version=version, detail=detail)
            for observer in self._observers:
                observer(span)

    def trainer_waited(self, cause: str, began: float, version: int | None = None, batch: int | None = None) -> None:
        """Records that the trainer waited, for ``"experience"`` or ``"push"``."""
        self._idle.trainer(cause, time.monotonic() - began)
        self.observe("trainer", "wait", began, version, batch, cause)

    def explorers(self, states: Mapping[int, str]) -> None:
        """Notes what each explorer that is alive does: ``"explore"``, ``"load"``, or what it waits for."""
        now = time.monotonic()
        self._idle.keep(states, now)
        for index, state in states.items():
            ended = self._idle.explorer(index, state, now)
            if ended is not None and ended[0] in ("weights", "room"):
                self.observe(f"explorer {index}", "wait", ended[1], detail=ended[0])

    def metrics(self) -> dict[str, float]:
        """What explorers did since the last call, in seconds, their mean."""
        return self._idle.metrics()

    def summary(self) -> str:
        """One line about who waited for whom, and what to change."""
        return self._idle.summary()
