"""GRPO: group relative policy optimisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.trainer.objectives.advantages import group_relative
from lightning_rft.trainer.objectives.losses import clipped_surrogate, importance_ratio, kl_k3
from lightning_rft.trainer.objectives.objective import Objective

__all__ = ["GRPO"]


@dataclass(frozen=True)
class GRPO(Objective):
    """Group relative policy optimisation, `Shao et al. 2024 <https://arxiv.org/abs/2402.03300>`_.

    PPO's clipped surrogate on group-relative advantages. The ratio is taken against the policy that sampled each
    token, which also corrects for stale experience and for an engine that rounds differently. There is no KL penalty,
    and every token of the batch has the same weight (`DAPO <https://arxiv.org/abs/2503.14476>`_).

    Args:
        clip_low: How far the ratio may fall below 1 before clipping; above 0, at most 1.
        clip_high: How far the ratio may rise above 1 before clipping; above 0. DAPO's clip-higher is 0.28.
        scale_rewards: Whether advantages are divided by the standard deviation of their group.

    Raises:
        ConfigurationError: A clipping range is out of bounds.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    scale_rewards: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.clip_low <= 1:
            raise ConfigurationError(f"clip_low={self.clip_low} must be above 0 and at most 1")
        if not self.clip_high > 0:
            raise ConfigurationError(f"clip_high={self.clip_high} must be above 0")

    @property
    @override
    def needs_group(self) -> bool:
        return True

    @property
    @override
    def skips_zero_advantage(self) -> bool:
        return True  # the surrogate is proportional to the advantage, and there is no other term

    @override
    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        return group_relative(rewards, groups, scale=self.scale_rewards)

    @override
    def token_loss(
        self, logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = importance_ratio(logprobs, sampling_logprobs)
        loss, clipped = clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high)
        kl = kl_k3(logprobs.detach(), sampling_logprobs)
        return loss, {"clip_fraction": clipped.to(loss.dtype), "kl": kl.detach()}
