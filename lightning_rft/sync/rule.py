"""The rule of a strategy, and a check that it can work."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Literal

from typing_extensions import override

from lightning_rft.errors import ConfigurationError

__all__ = ["Exploration", "Rule", "check_rule", "checked_batches"]

_CHECKED_BATCHES = 1000


class Rule(ABC):
    """What tells one strategy from another: two answers, and how strict it is about order."""

    #: False: batches are trained in the order of issue, and the trainer waits for every push.
    #: True: a step trains the groups with the oldest weights first, or those with the highest scores that make no other
    #: group too old, and pushes happen in the background.
    asynchronous: bool = False
    #: Whether explorers work while the trainer does; then they share a CPU's cores.
    overlaps: bool = True
    #: Whether an explorer may load weights while it works on groups; else it finishes them first.
    in_flight: bool = False
    #: Share of the explorers that may load at the same time; below 1 exploration never stops as a whole, since then it
    #: is not all of them. One may in any case.
    loading: float = 1.0
    #: What happens to a group that would be too old after the next step: the step waits for it, or it is dropped.
    overdue: Literal["wait", "drop"] = "wait"

    @property
    @abstractmethod
    def max_staleness(self) -> int:
        """Maximum batches that a token may lag behind the version that is trained."""

    @abstractmethod
    def admit(self, batch: int) -> int:
        """The version that an explorer must have loaded to start a group of ``batch``; never decreases."""

    @abstractmethod
    def pushes_after(self, batch: int) -> bool:
        """Whether new weights are due once ``batch`` is trained."""

    def loads_at_once(self, explorers: int) -> int:
        """How many of so many explorers may load at the same time."""
        return max(1, int(self.loading * explorers))


class Exploration(Rule):
    """The rule of exploring without training: every batch is explored at once, with the first weights."""

    @property
    @override
    def max_staleness(self) -> int:
        return sys.maxsize  # nothing is trained

    @override
    def admit(self, batch: int) -> int:
        return 0

    @override
    def pushes_after(self, batch: int) -> bool:
        return False


def checked_batches(first: int, stop: int | None) -> range:
    """The batches, from ``first`` on and before ``stop``, for which settings are checked."""
    last = first + _CHECKED_BATCHES
    return range(first, last if stop is None else min(stop, last))


def check_rule(rule: Rule, first: int, stop: int | None) -> None:
    """Raises ConfigurationError for a rule that breaks its own bound, or under which a batch can never be explored."""
    name, pushed, before = type(rule).__name__, first, first
    for batch in checked_batches(first, stop):
        admitted = max(rule.admit(batch), first)  # there is nothing older than the first
        if admitted < before:
            raise ConfigurationError(
                f"{name}.admit({batch}) is {admitted}, less than {before} for the batch before: it must never decrease"
            )
        if batch - admitted > rule.max_staleness:
            raise ConfigurationError(
                f"{name}.admit({batch}) is {admitted}: {batch} - {admitted} is a staleness of {batch - admitted} when"
                f" that batch is trained, above max_staleness={rule.max_staleness}"
            )
        if admitted > pushed:
            raise ConfigurationError(
                f"{name} could never train batch {batch}: admit({batch}) asks for version {admitted}, but the newest"
                f" that is pushed before batch {batch} is trained is {pushed}. Push more often or admit earlier"
            )
        before = admitted
        if rule.pushes_after(batch):
            pushed = batch + 1
