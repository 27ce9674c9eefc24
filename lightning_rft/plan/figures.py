"""What a plan is made of: how long each side takes, and which strategies are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_rft.errors import ConfigurationError
from lightning_rft.sync.fully_asynchronous import FullyAsynchronous
from lightning_rft.sync.multi_explorer import MultiExplorerAsynchronous
from lightning_rft.sync.one_step_off_policy import OneStepOffPolicy
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.sync.synchronous import Synchronous

__all__ = ["Case", "Figures", "cases"]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Seconds of a run's parts, each side by itself."""

    train_s: float  #: A training step.
    push_s: float  #: A push, which holds both sides up where a strategy waits for it.
    load_s: float  #: A load by an explorer alone, which holds it up.
    sample_s: Sequence[Sequence[float]]  #: The samples of some groups, which are taken in turn.
    tasks_per_step: int
    at_once: int  #: Samples that an explorer runs at once; more of them are no faster.

    def __post_init__(self) -> None:
        for name in ("train_s", "push_s", "load_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 0")
        if not all(0 <= seconds < float("inf") for group in self.sample_s for seconds in group):
            raise ConfigurationError(f"explore_s={max(map(max, self.sample_s))} must be at least 0")
        for name in ("tasks_per_step", "at_once"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 1")
        if self.train_s + sum(map(sum, self.sample_s)) == 0:
            raise ConfigurationError("train_s and explore_s are both 0: there is nothing to plan")

    @property
    def samples(self) -> int:
        """Samples of a group."""
        return len(self.sample_s[0])


@dataclass(frozen=True)
class Case:
    """A strategy, and the number of its explorers."""

    rule: SyncStrategy
    explorers: int

    @property
    def name(self) -> str:
        """The strategy as one would write it."""
        bound = f", max_staleness={self.rule.max_staleness}" if self.rule.asynchronous else ""
        return f"{type(self.rule).__name__}(sync_interval={self.rule.sync_interval}{bound})"


def cases(explorers: Sequence[int], intervals: Sequence[int], bounds: Sequence[int]) -> list[Case]:
    """The four strategies with every interval and bound that they permit, on-policy ones first."""
    pairs = [(interval, bound) for interval in intervals for bound in bounds if bound >= interval - 1]
    found: list[Case] = []
    for count in explorers:
        rules: list[SyncStrategy] = [Synchronous(interval) for interval in sorted({1, *intervals})]
        rules += [OneStepOffPolicy(interval) for interval in intervals]
        rules += [FullyAsynchronous(*pair) for pair in pairs]
        if count > 1:
            rules += [MultiExplorerAsynchronous(*pair) for pair in pairs]
        found += [Case(rule, count) for rule in rules]
    return found
