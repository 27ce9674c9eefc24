"""GRPO: group relative policy optimisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_rft.errors import ConfigurationError
from lightning_rft.trainer.objectives.advantages import group_relative
from lightning_rft.trainer.objectives.losses import clipped_surrogate, importance_ratio, kl_k3
from lightning_rft.trainer.objectives.objective import Objective

__all__ = ["GRPO"]


@dataclass(frozen=True)
class GRPO(Objective):
    """Group relative policy optimisation, `Shao et al. 2024 <https://arxiv.org/abs/2402.03300>`_.

    PPO's clipped surrogate on group-relative advantages. The ratio is taken against the policy that sampled each
    token, which also corrects for experience that is some versions old and for an engine that rounds differently.
    There is no KL penalty, and every token of the batch weighs the same (`DAPO <https://arxiv.org/abs/2503.14476>`_).

    Args:
        clip_low: How far the ratio may fall below 1 before clipping; above 0, at most 1.
        clip_high: How far it may rise above 1; above 0. DAPO's clip-higher is 0.28.
        scale_rewards: Whether advantages are divided by the standard deviation of their group.

    Raises:
        ConfigurationError: If a clipping range is out of bounds.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    scale_rewards: bool = True

    def __post_init__(self) -> None:
        """Refuse clipping ranges that cannot work."""
        if not 0 < self.clip_low <= 1:
            raise ConfigurationError(f"clip_low={self.clip_low} must be above 0 and at most 1")
        if not self.clip_high > 0:
            raise ConfigurationError(f"clip_high={self.clip_high} must be above 0")

    @property
    def needs_group(self) -> bool:
        """True: a sample is compared with the others of its task."""
        return True

    @property
    def skips_zero_advantage(self) -> bool:
        """True: the surrogate is proportional to the advantage, and there is no other term."""
        return True

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Compute group-relative advantages [S]."""
        return group_relative(rewards, groups, scale=self.scale_rewards)

    def token_loss(
        self, logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the clipped surrogate of each token [N]; see :meth:`Objective.token_loss`."""
        ratio = importance_ratio(logprobs, sampling_logprobs)
        loss, clipped = clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high)
        kl = kl_k3(logprobs.detach(), sampling_logprobs)
        return loss, {"clip_fraction": clipped.to(loss.dtype), "kl": kl.detach()}
