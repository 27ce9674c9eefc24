"""The value that an objective works on: the sampled tokens of some samples, flattened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Level", "TokenBatch", "log_ratio"]

#: What a ratio of probabilities is taken of: a token; a sample, as the geometric mean over its tokens; or a whole
#: sample, as the product over its tokens.
Level = Literal["token", "sequence", "product"]

# exp(20) is beyond any clipping range; exp(89) is inf in fp32, and a clipped inf has a NaN gradient (0 x inf).
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class TokenBatch:
    """N sampled tokens of S samples; tensors are [N], float32 and in nats where nothing else is said.

    Args:
        logprobs: Log-probabilities under the policy in training, differentiable.
        sampling_logprobs: The same under the policy that sampled each token.
        advantages: Advantage of each token.
        sample: Index of the sample that each token belongs to, int64.
        lengths: Sampled tokens of each whole sample [S].
        entropy: Entropy of the distribution that each token was drawn from; differentiable if an objective asks for it.
        elsewhere: For each sample, the sum of ``logprobs - sampling_logprobs`` over its tokens that are in other
            micro-batches [S]; left out, there are none.
        proximal_logprobs: Log-probabilities under the policy that ratios are taken against, where a batch is trained
            several times: `decoupled PPO <https://arxiv.org/abs/2110.00641>`_. Left out, it is the policy in training.
        reference_logprobs: Log-probabilities under a reference policy.
    """

    logprobs: Tensor
    sampling_logprobs: Tensor
    advantages: Tensor
    sample: Tensor
    lengths: Tensor
    entropy: Tensor | None = None
    elsewhere: Tensor | None = None
    proximal_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None

    def at(self, level: Level, values: Tensor, elsewhere: Tensor | None = None) -> Tensor:
        """Values of each token [N] at another level, without a gradient: of each token, what its sample has [N].

        ``elsewhere`` is their sum over tokens in other micro-batches [S].
        """
        values = values.detach()
        if level == "token":
            return values
        total = torch.zeros_like(self.lengths, dtype=values.dtype).index_add(0, self.sample, values)
        if elsewhere is not None:
            total = total + elsewhere
        return (total / self.lengths.clamp(min=1) if level == "sequence" else total)[self.sample]


def bounded(log_ratios: Tensor) -> Tensor:
    """Log-ratios within ±20, so that neither a ratio nor its gradient overflows."""
    return log_ratios.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def log_ratio(tokens: TokenBatch, level: Level, *, corrected: bool) -> Tensor:
    """Log of the probability ratio whose surrogate is optimised, for each token [N], differentiable.

    It is taken against the proximal policy if ``corrected``, that is, if a correction bridges the way from there to the
    policy that sampled; else against that policy itself. A sample's ratio is that of all of its tokens, in whichever
    micro-batch: its value comes without a gradient, which is then that of the token alone (`GSPO-token
    <https://arxiv.org/abs/2507.18071>`_) and sums up to the gradient of the sample's ratio.
    """
    elsewhere = None
    if tokens.proximal_logprobs is not None:
        against = tokens.proximal_logprobs
    elif corrected:
        against = tokens.logprobs.detach()
    else:
        against, elsewhere = tokens.sampling_logprobs, tokens.elsewhere
    if level == "token":
        return bounded(tokens.logprobs - against)
    value = bounded(tokens.at(level, tokens.logprobs - against, elsewhere))
    own = tokens.logprobs - tokens.logprobs.detach()
    # averaged over a sample's tokens, as losses are, this is the gradient of a sum
    return value + (own if level == "sequence" else own * tokens.lengths[tokens.sample])
