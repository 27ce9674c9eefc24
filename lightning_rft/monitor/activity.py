"""The activity of trainer and explorers: totals for a run's metrics, and spans for its timeline."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from lightning_rft.monitor.spans import Span

__all__ = ["Activity", "advice"]

_NAMES = {"explore": "explore", "weights": "wait_weights", "room": "wait_room", "load": "load"}


class Activity:
    """Adds up what explorers and trainer do, and passes spans to observers; only :meth:`observe` is thread-safe."""

    def __init__(self, observers: Sequence[Callable[[Span], None]]) -> None:
        self._observers = observers
        self._began = self._counted = time.monotonic()
        self._states: dict[int, tuple[str, float]] = {}  # explorer -> what it does, and since when
        self._seconds: dict[str, float] = defaultdict(float)  # by state, of all explorers together, until _counted
        self._reported: dict[str, float] = defaultdict(float)
        self._waited: dict[str, float] = defaultdict(float)  # by cause, of the trainer

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
        self._waited[cause] += time.monotonic() - began
        self.observe("trainer", "wait", began, version, batch, cause)

    def explorers(self, states: Mapping[int, str]) -> None:
        """Records what each live explorer does: ``"explore"``, ``"load"``, or what it waits for."""
        now = time.monotonic()
        for index, (before, since) in list(self._states.items()):
            self._seconds[before] += now - self._counted
            if index not in states:
                del self._states[index]
            elif states[index] != before:
                self._states[index] = states[index], now
                if before in ("weights", "room"):
                    self.observe(f"explorer {index}", "wait", since, detail=before)
        for index, state in states.items():
            self._states.setdefault(index, (state, now))
        self._counted = now

    def metrics(self) -> dict[str, float]:
        """Mean seconds that an explorer spent in each state since the last call."""
        count = max(1, len(self._states))
        values = {
            f"rft/explorer_{name}_s": (self._seconds[state] - self._reported[state]) / count
            for state, name in _NAMES.items()
        }
        self._reported = defaultdict(float, self._seconds)
        return values

    def summary(self) -> str:
        """One line of advice about the whole run."""
        total = max(time.monotonic() - self._began, 1e-9)
        explorers = max(1e-9, sum(self._seconds.values()))
        return advice(
            experience=self._waited["experience"] / total,
            push=self._waited["push"] / total,
            weights=self._seconds["weights"] / explorers,
            room=self._seconds["room"] / explorers,
            load=self._seconds["load"] / explorers,
        )


def advice(*, experience: float, push: float, weights: float, room: float, load: float) -> str:
    """Says which side was the bottleneck and what to change.

    ``experience`` and ``push`` are the shares of its time that the trainer waited for experience, and for groups to
    finish before a push; ``weights``, ``room`` and ``load`` are the shares that explorers waited for new weights and
    for room in the buffer, and loaded weights.

    Example:
        >>> print(advice(experience=0.6, push=0.0, weights=0.05, room=0.0, load=0.05))
        The trainer waited 60 % of the time (experience 60 %, pushes 0 %), explorers 5 % (weights 5 %, room 0 %) and \
loaded weights for 5 %. Exploration is the bottleneck: add explorers, or lower max_new_tokens.
    """
    facts = (
        f"The trainer waited {experience + push:.0%} of the time (experience {experience:.0%}, pushes {push:.0%}), "
        f"explorers {weights + room:.0%} (weights {weights:.0%}, room {room:.0%}) and loaded weights for {load:.0%}."
    ).replace("%", " %")
    if max(experience + push, weights + room) < 0.1 and load < 0.2:
        verdict = "Both sides were busy: only faster hardware, or less work, makes it faster."
    elif load >= 0.2 and load >= max(experience, weights):
        verdict = "Weight pushes are the bottleneck: raise sync_interval."
    elif min(experience + push, weights + room) > 0.1:
        verdict = (
            "They wait for each other: let them overlap, with OneStepOffPolicy(), FullyAsynchronous() or a larger "
            "max_staleness."
        )
    elif experience + push >= weights + room:
        verdict = "Exploration is the bottleneck: add explorers, or lower max_new_tokens."
    else:
        verdict = "Training is the bottleneck: use fewer explorers, or give the trainer more of the hardware."
    return f"{facts} {verdict}"
