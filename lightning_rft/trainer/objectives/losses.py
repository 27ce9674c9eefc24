"""Per-token terms of policy-gradient losses: pure functions of log-probabilities and advantages."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clipped_surrogate", "importance_ratio", "kl_k3"]

# exp(20) is beyond any clipping range; exp(89) is inf in fp32, and a clipped inf has a NaN gradient (0 x inf).
_MAX_LOG_RATIO = 20.0


def _log_ratio(logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    return (logprobs - sampling_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def importance_ratio(logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    """Probability of each token [N] under the trained policy over that under the sampling one, clamped to exp(±20)."""
    return _log_ratio(logprobs, sampling_logprobs).exp()


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate as a loss of each token [N], and whether clipping removed its gradient [N], bool.

    ``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``: `Schulman et al. 2017
    <https://arxiv.org/abs/1707.06347>`_, with a range that need not be symmetric (clip-higher), `DAPO, Yu et al. 2025
    <https://arxiv.org/abs/2503.14476>`_.

    Example:
        >>> clipped_surrogate(torch.tensor([1.5, 1.5]), torch.tensor([1.0, -1.0]), 0.2, 0.25)
        (tensor([-1.2500,  1.5000]), tensor([ True, False]))
    """
    loss = -ratio * advantages
    clipped_loss = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    return torch.maximum(loss, clipped_loss), clipped


def kl_k3(logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    """Estimates KL(sampling policy || trained policy) in nats [N] from tokens that the sampling policy drew.

    ``ratio - 1 - log(ratio)``, the estimator k3 of `Schulman 2020 <http://joschu.net/blog/kl-approx.html>`_:
    unbiased, and never negative.
    """
    log_ratio = _log_ratio(logprobs, sampling_logprobs)
    # expm1: near a ratio of 1, exp(x) - 1 loses what is left after subtracting x.
    return torch.expm1(log_ratio) - log_ratio
