"""The options of ``lightning-rft plan``."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_rft.errors import ConfigurationError

__all__ = ["PlanSettings"]


@dataclass(frozen=True)
class PlanSettings:
    """What is planned for, and which seconds are known already; the others are measured, for which a config is needed.

    Args:
        train_s: Seconds of a training step.
        explore_s: Seconds to explore a group, with all groups of a step explored at once.
        push_s: Seconds of a push of the weights.
        load_s: Seconds in which an explorer that loads by itself samples nothing; left out, as measured, or ``push_s``.
        explorers: Numbers of explorers to compare; left out, the config's, or 1.
        at_once: Samples that an explorer runs at once in those seconds; more wait. Left out, its share of a step's.
        tasks_per_step: Groups of a step; the config's if there is one, left out 8.
        samples_per_task: Samples of a group, likewise.
        intervals: Batches between two pushes.
        bounds: Maximum staleness of the asynchronous strategies.
        threshold: Share of a step that a strategy must save to be recommended.
        seconds: How long to measure at most, once the first steps are done.
        picture: File for the picture, which needs matplotlib; null for none.
    """

    train_s: float | None = None
    explore_s: float | None = None
    push_s: float | None = None
    load_s: float | None = None
    explorers: list[int] | None = None
    at_once: int | None = None
    tasks_per_step: int | None = None
    samples_per_task: int | None = None
    intervals: list[int] = field(default_factory=lambda: [1, 2])
    bounds: list[int] = field(default_factory=lambda: [1, 2, 4])
    threshold: float = 0.1
    seconds: float = 60.0
    picture: str | None = "plan.png"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ConfigurationError(f"threshold={self.threshold} must be at least 0 and below 1: a share of a step")
        for name in ("intervals", "bounds", "explorers"):
            if getattr(self, name) == []:
                raise ConfigurationError(f"{name}=[] leaves nothing to compare")
        if min(self.explorers or [1]) < 1:
            raise ConfigurationError(
                f"explorers={min(self.explorers or [])} must be at least 1: a plan needs both sides"
            )

    @property
    def missing(self) -> list[str]:
        """The seconds that must be measured."""
        return [name for name in ("train_s", "explore_s", "push_s") if getattr(self, name) is None]
