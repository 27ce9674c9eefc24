"""The distance from a reference policy, as a penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_rft.errors import ConfigurationError
from lightning_rft.trainer.objectives.tokens import bounded

__all__ = ["KL", "kl_divergence"]

Estimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class KL:
    """A penalty on the Kullback-Leibler divergence from the reference policy, ``RFTModule(reference=...)``.

    Args:
        coefficient: Weight of the penalty; at least 0.
        estimator: ``"k1"`` (log-ratio), ``"k2"`` (half of its square) or ``"k3"`` (never negative, of low variance):
            `Schulman 2020 <http://joschu.net/blog/kl-approx.html>`_. In a loss, the gradient of k1 is zero on average,
            so it belongs into the reward.
        where: Whether it is added to the loss of each token, or taken from the reward of each sample, before advantages
            are made: there it is k1 summed over the sample's tokens, under the policy that sampled them.
        corrected: Whether the loss's term is weighted with the importance ratio, which makes it unbiased off policy
            (`DeepSeek-V3.2 <https://arxiv.org/abs/2512.02556>`_).

    Raises:
        ConfigurationError: The coefficient is negative, or k2 or k3 are to be in the reward.
    """

    coefficient: float
    estimator: Estimator = "k3"
    where: Literal["loss", "reward"] = "loss"
    corrected: bool = False

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigurationError(f"KL(coefficient={self.coefficient}) must be at least 0")
        if self.where == "reward" and self.estimator != "k1":
            raise ConfigurationError(f"KL(where='reward', estimator={self.estimator!r}): set estimator='k1' there")


def kl_divergence(logprobs: Tensor, other: Tensor, estimator: Estimator) -> Tensor:
    """Estimates KL(policy || other) in nats [N] from tokens that the policy drew, given both log-probs of each [N]."""
    log_ratio = bounded(other - logprobs)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    # expm1: near a ratio of 1, exp(x) - 1 loses what is left after subtracting x.
    return torch.expm1(log_ratio) - log_ratio
