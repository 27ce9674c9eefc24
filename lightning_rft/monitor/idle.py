"""Who waited for whom, and for how long: the figures behind the line at the end of a run that says what to change."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Container

__all__ = ["Idle", "advice"]

_NAMES = {"explore": "explore", "weights": "wait_weights", "room": "wait_room", "load": "load"}


class Idle:
    """Adds up what explorers and trainer did. Not thread-safe."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._states: dict[int, tuple[str, float]] = {}  # explorer -> what it is at, counted up to when
        self._since: dict[int, float] = {}  # explorer -> since when it is at that
        self._seconds: dict[str, float] = defaultdict(float)  # of all explorers together
        self._reported: dict[str, float] = defaultdict(float)
        self._trainer: dict[str, float] = defaultdict(float)

    def explorer(self, index: int, state: str, now: float) -> tuple[str, float] | None:
        """Notes what an explorer is at: ``"explore"``, ``"load"``, or what it waits for.

        Returns:
            What it was at before and since when, if that has changed.
        """
        before, counted = self._states.get(index, (state, now))
        self._seconds[before] += now - counted
        self._states[index] = state, now
        since = self._since.setdefault(index, now)
        if before == state:
            return None
        self._since[index] = now
        return before, since

    def keep(self, alive: Container[int], now: float) -> None:
        """Forgets the explorers that are not alive."""
        for index in [index for index in self._states if index not in alive]:
            self.explorer(index, "gone", now)
            del self._states[index], self._since[index]

    def trainer(self, cause: str, seconds: float) -> None:
        """Adds to what the trainer waited for: ``"experience"`` or ``"push"``."""
        self._trainer[cause] += seconds

    def metrics(self) -> dict[str, float]:
        """Seconds of each kind since the last call, the mean of all explorers."""
        count = max(1, len(self._states))
        values = {
            f"rft/explorer_{name}_s": (self._seconds[state] - self._reported[state]) / count
            for state, name in _NAMES.items()
        }
        self._reported = defaultdict(float, self._seconds)
        return values

    def summary(self) -> str:
        """One line: what each side did, which was the bottleneck, and what to change."""
        total = max(time.monotonic() - self._began, 1e-9)
        explorers = max(1e-9, sum(self._seconds.values()))
        return advice(
            experience=self._trainer["experience"] / total,
            push=self._trainer["push"] / total,
            weights=self._seconds["weights"] / explorers,
            room=self._seconds["room"] / explorers,
            load=self._seconds["load"] / explorers,
        )


def advice(*, experience: float, push: float, weights: float, room: float, load: float) -> str:
    """Says which side was the bottleneck and what to change.

    Args:
        experience: Share of its time that the trainer waited for experience.
        push: Share of its time that it waited for what older weights must explore, before a push.
        weights: Share of their time that explorers waited for new weights.
        room: Share of their time that they waited for room in the buffer.
        load: Share of their time that they loaded weights.

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
        verdict = "Training is the bottleneck: fewer explorers would do, or give the trainer more of the hardware."
    return f"{facts} {verdict}"
