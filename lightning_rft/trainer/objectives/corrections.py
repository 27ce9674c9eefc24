"""Corrections for experience that another policy sampled: a detached weight of each token.

A token's ratio is that of the proximal policy, which without further notice is the policy in training, over the policy
that sampled it: older by some batches, or the same weights in an engine that rounds differently.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.trainer.objectives.tokens import Level, TokenBatch, bounded

__all__ = ["Correction", "Masked", "Truncated"]


class Correction(ABC):
    """Base class of corrections: subclass it as a frozen dataclass whose fields are its settings."""

    level: Level

    def __call__(self, tokens: TokenBatch) -> Tensor:
        """The weight of each token [N], detached."""
        proximal = tokens.logprobs if tokens.proximal_logprobs is None else tokens.proximal_logprobs
        elsewhere = tokens.elsewhere if tokens.proximal_logprobs is None else None
        return self.weights(bounded(tokens.at(self.level, proximal - tokens.sampling_logprobs, elsewhere)).exp())

    @abstractmethod
    def weights(self, ratio: Tensor) -> Tensor:
        """The weight of each token, given its ratio at :attr:`level` [N]."""


@dataclass(frozen=True)
class Truncated(Correction):
    """Truncated importance weights, ``clip(r, low, high)``.

    `Espeholt et al. 2018 <https://arxiv.org/abs/1802.01561>`_, `Yao et al. 2025
    <https://fengyao.notion.site/off-policy-rl>`_: exact where ratios are small, biased and bounded where they are not.

    Args:
        high: Largest weight, above 0.
        level: What a ratio is taken of.
        low: Least weight, from 0 to ``high``.

    Raises:
        ConfigurationError: A weight is out of its range.
    """

    high: float = 2.0
    level: Level = "token"
    low: float = 0.0

    def __post_init__(self) -> None:
        if not self.high > 0 or not 0 <= self.low <= self.high:
            raise ConfigurationError(f"Truncated(high={self.high}, low={self.low}) must be high > 0, 0 <= low <= high")

    @override
    def weights(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(self.low, self.high)


@dataclass(frozen=True)
class Masked(Correction):
    """Importance weights within a band, and no weight outside: what drifted too far is left out.

    At the level of tokens it is IcePop, `Ling team 2025 <https://arxiv.org/abs/2510.18855>`_; of ``"product"``, whole
    samples that became unlikely or much likelier are left out; of ``"sequence"``, with ``weighted=False`` and a narrow
    band, they are rejected by their geometric mean.

    Args:
        low: Lowest ratio that keeps its weight, at least 0.
        high: Highest one.
        level: What a ratio is taken of.
        weighted: Whether what is kept has its ratio for a weight; if not, the weight is 1.

    Raises:
        ConfigurationError: The band is empty.
    """

    low: float = 0.0
    high: float = 3.0
    level: Level = "token"
    weighted: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high or math.isnan(self.high):
            raise ConfigurationError(f"Masked(low={self.low}, high={self.high}) must be a band, from 0 on")

    @override
    def weights(self, ratio: Tensor) -> Tensor:
        kept = (ratio >= self.low) & (ratio <= self.high)
        return ratio.masked_fill(~kept, 0.0) if self.weighted else kept.to(ratio.dtype)
