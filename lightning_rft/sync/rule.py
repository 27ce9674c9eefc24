"""The rule of a strategy, which sets it apart from others: two answers, and a check that they can work at all."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Literal

from typing_extensions import override

from lightning_rft.errors import ConfigurationError

__all__ = ["Exploration", "Rule", "check_rule"]

_CHECKED_BATCHES = 1000


class Rule(ABC):
    """The part of a strategy that sets it apart from others: two answers, and how strict it is about order."""

    #: False: batches are trained in the order in which they were issued, and the trainer waits for every push.
    #: True: a step trains the groups with the oldest weights first, or with the highest scores of those that leave
    #: nothing else too old, and pushes happen in the background.
    asynchronous: bool = False
    #: Whether explorers work while the trainer does; then they share the cores of a CPU.
    overlaps: bool = True
    #: Whether an explorer may change weights while it works on groups; else it finishes them first.
    in_flight: bool = False
    #: Whether explorers load one after another, so that exploration never stops as a whole.
    staggered: bool = False
    #: What becomes of a group that would be too old after the next step: the step waits for it, or it is dropped.
    overdue: Literal["wait", "drop"] = "wait"

    @property
    @abstractmethod
    def max_staleness(self) -> int:
        """Maximum batches that a token may lag behind the version that is trained."""

    @abstractmethod
    def admit(self, batch: int) -> int:
        """The version that an explorer must have loaded before it may start a group of ``batch``.

        Never decreases with ``batch``.
        """

    @abstractmethod
    def pushes_after(self, batch: int) -> bool:
        """Whether new weights are due once ``batch`` is trained."""


class Exploration(Rule):
    """The rule of exploring without training: every batch at once with the first weights, which are never replaced."""

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


def check_rule(rule: Rule, first: int, stop: int | None) -> None:
    """Refuses a rule that breaks its own bound, or under which some batch could never be explored.

    Args:
        rule: The strategy's answers.
        first: Batch to start with, and the oldest version that there is.
        stop: Batches before ``stop`` exist; ``None`` for no end.

    Raises:
        ConfigurationError: The rule can never make progress; the message has the arithmetic.
    """
    name, pushed, before = type(rule).__name__, first, first
    for batch in range(first, min(first + _CHECKED_BATCHES, first + _CHECKED_BATCHES if stop is None else stop)):
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
