"""Surrogates: what is descended for each token, given its ratio and its advantage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_rft.errors import ConfigurationError

__all__ = ["Clip", "Gamma", "Likelihood", "Plain", "SoftGate", "Squared", "StopGradient", "Surrogate"]


class Surrogate(ABC):
    """Base class of surrogates: subclass it as a frozen dataclass whose fields are its settings."""

    #: Whether the loss of a token is proportional to its advantage, so that a sample without one needs no computation.
    proportional = True

    @abstractmethod
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the loss of each token.

        Args:
            log_ratio: Log of the probability ratio [N], differentiable and finite.
            logprobs: Log-probabilities under the policy in training [N], differentiable.
            advantages: Advantages [N].

        Returns:
            Loss of each token [N], and whether its gradient was cut off or cut down [N], bool.
        """


@dataclass(frozen=True)
class Clip(Surrogate):
    """PPO's clipped surrogate: ``-min(r * A, clip(r, 1 - low, 1 + high) * A)``.

    `Schulman et al. 2017 <https://arxiv.org/abs/1707.06347>`_. The range need not be symmetric (clip-higher,
    `DAPO <https://arxiv.org/abs/2503.14476>`_). The second bound keeps a token that has become much likelier, and
    should not have, from ruling the batch: for negative advantages the ratio counts as ``dual`` at most (dual clip,
    `Ye et al. 2020 <https://arxiv.org/abs/1912.09729>`_).

    Args:
        low: How far the ratio may fall below 1; above 0, at most 1.
        high: How far the ratio may rise above 1; above 0.
        dual: Largest ratio for negative advantages, at least ``1 + high``; None for no bound.

    Raises:
        ConfigurationError: A bound is out of its range.

    Example:
        >>> ratio = torch.tensor([1.5, 1.5, 9.0])
        >>> Clip(0.2, 0.25)(ratio.log(), ratio.log(), torch.tensor([1.0, -1.0, -1.0]))
        (tensor([-1.2500,  1.5000,  3.0000]), tensor([ True, False,  True]))
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= 1:
            raise ConfigurationError(f"Clip(low={self.low}) must be above 0 and at most 1")
        if not self.high > 0:
            raise ConfigurationError(f"Clip(high={self.high}) must be above 0")
        if self.dual is not None and not self.dual >= 1 + self.high:
            raise ConfigurationError(f"Clip(dual={self.dual}) must be at least 1 + high, {1 + self.high}")

    @override
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        ratio = log_ratio.exp()
        loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - self.low, 1 + self.high) * advantages)
        cut = ((advantages > 0) & (ratio > 1 + self.high)) | ((advantages < 0) & (ratio < 1 - self.low))
        if self.dual is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -self.dual * advantages), loss)
            cut = cut | ((advantages < 0) & (ratio > self.dual))
        return loss, cut


@dataclass(frozen=True)
class Plain(Surrogate):
    """The importance-weighted policy gradient, ``-r * A``: unbiased, with a variance that grows with the ratios."""

    @override
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        return -log_ratio.exp() * advantages, torch.zeros_like(advantages, dtype=torch.bool)


@dataclass(frozen=True)
class Likelihood(Surrogate):
    """The policy gradient without a ratio, ``-A * log p``: exact on policy, biased towards what was sampled off it."""

    @override
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        return -advantages * logprobs, torch.zeros_like(advantages, dtype=torch.bool)


@dataclass(frozen=True)
class StopGradient(Surrogate):
    """Log-likelihood weighted by the ratio within bounds, without its gradient: ``-sg(clip(r, bounds)) * A * log p``.

    No token loses its gradient altogether, however far its ratio: CISPO, `MiniMax 2025
    <https://arxiv.org/abs/2506.13585>`_. Bounds that depend on the sign of the advantage make it tapered: TOPR,
    `Le Roux et al. 2025 <https://arxiv.org/abs/2503.14286>`_.

    Args:
        positive: Lowest and highest ratio where the advantage is positive.
        negative: The same where it is negative.

    Raises:
        ConfigurationError: A lowest ratio is negative or above its highest.
    """

    positive: tuple[float, float] = (0.0, 5.0)
    negative: tuple[float, float] = (0.0, 5.0)

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ConfigurationError(f"StopGradient({name}={(low, high)}) must be (lowest, highest), from 0 on")

    @override
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        ratio = log_ratio.detach().exp()
        weight = torch.where(advantages > 0, ratio.clamp(*self.positive), ratio.clamp(*self.negative))
        return -weight * advantages * logprobs, weight < ratio


@dataclass(frozen=True)
class SoftGate(Surrogate):
    """A smooth gate in place of clipping: ``-sigmoid(t * (r - 1)) * 4 / t * A``, steeper for negative advantages.

    SAPO, `Gao et al. 2025 <https://arxiv.org/abs/2511.20347>`_.

    Args:
        positive: Temperature t for positive advantages, above 0.
        negative: The same for negative ones.

    Raises:
        ConfigurationError: A temperature is not above 0.
    """

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"SoftGate({name}={getattr(self, name)}) must be above 0")

    @override
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        slope = _by_sign(advantages, self.positive, self.negative)
        gate = torch.sigmoid(slope * (log_ratio.exp() - 1))
        return -gate * 4 / slope * advantages, gate * (1 - gate) < 0.125  # less than half of the gradient at 1


@dataclass(frozen=True)
class Squared(Surrogate):
    """Regularised by the squared log-ratio: ``-A * log p + strength / 2 * (log r)^2``.

    Online policy mirror descent, `Kimi k1.5, 2025 <https://arxiv.org/abs/2501.12599>`_: near the policy that sampled,
    its gradient is that of fitting ``strength * log r`` to the advantage, on policy or off it.

    Args:
        strength: Weight of the regularisation, the papers' tau; at least 0.

    Raises:
        ConfigurationError: The strength is negative.
    """

    strength: float = 0.1
    proportional = False

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ConfigurationError(f"Squared(strength={self.strength}) must be at least 0")

    @override
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        pull = self.strength * log_ratio.detach()
        return (pull - advantages) * logprobs, torch.zeros_like(advantages, dtype=torch.bool)


@dataclass(frozen=True)
class Gamma(Surrogate):
    """Log-likelihood weighted by a function of the ratio that is 1 at 1 and falls on both sides, detached.

    ``-sg(r^k * exp(l * (1 - r))) * A * log p``: VESPO, `Shen et al. 2026 <https://arxiv.org/abs/2602.10693>`_.

    Args:
        positive: Shape k and rate l for positive advantages.
        negative: The same for negative ones.
    """

    positive: tuple[float, float] = (2.0, 3.0)
    negative: tuple[float, float] = (3.0, 2.0)

    @override
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        shape, rate = (
            _by_sign(advantages, positive, negative)
            for positive, negative in zip(self.positive, self.negative, strict=True)
        )
        value = log_ratio.detach()
        weight = (shape * value + rate * (1 - value.exp())).exp()
        return -weight * advantages * logprobs, weight < 0.5


def _by_sign(advantages: Tensor, positive: float, negative: float) -> Tensor:
    """One number where the advantage is positive, another where it is not [N]."""
    return torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)
