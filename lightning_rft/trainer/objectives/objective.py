"""The composition that every objective is: rewards become advantages, and these a weighted loss per token."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor

from lightning_rft.errors import ConfigurationError
from lightning_rft.trainer.objectives.advantages import Advantage, GroupRelative
from lightning_rft.trainer.objectives.corrections import Correction, Truncated
from lightning_rft.trainer.objectives.normalisation import Normalisation
from lightning_rft.trainer.objectives.penalties import KL, kl_divergence
from lightning_rft.trainer.objectives.surrogates import Clip, Surrogate
from lightning_rft.trainer.objectives.tokens import Level, TokenBatch, log_ratio

__all__ = ["Objective"]


@dataclass(frozen=True)
class Objective(ABC):  # noqa: B024 (of a plain dataclass, a config could not name subclasses)
    """What is optimised: five choices and two terms, each of which may be set anew in every preset.

    The loss of a batch is the sum over its tokens of ``weight * correction * surrogate(ratio, advantage)``. Advantages
    and weights are made once for the whole batch, before it is cut into micro-batches and ranks, so that the loss
    depends on no cut.

    Args:
        advantage: How rewards become advantages.
        ratio: What the probability ratio is taken of.
        surrogate: The loss of a token, given ratio and advantage.
        correction: What bridges the way from the policy in training to the one that sampled. None: the ratio is taken
            against the policy that sampled, and the surrogate bounds it. A correction: the ratio is taken against the
            policy in training (its value is 1), and its surrogate is multiplied by the correction's weight. ``"auto"``:
            None where the strategy is on policy, else :class:`Truncated`.
        normalisation: What the sum over tokens is divided by.
        credit: Whether all tokens of a ``"sample"`` have its advantage, or each ``"turn"`` has its own: that of the
            sample's reward without the rewards of earlier turns, among all turns of the group.
        mask_truncated: Whether samples that were cut off at ``max_new_tokens`` are left out of the loss. They still
            count in advantages and as samples, but their tokens no longer among those that are divided by.
        kl: A penalty on the distance from the reference policy.
        entropy: Weight of an entropy bonus, at least 0.

    Raises:
        ConfigurationError: A setting is out of its range.

    Example::

        Objective(advantage=LeaveOneOut(), surrogate=SoftGate(), kl=KL(0.01))
    """

    advantage: Advantage = GroupRelative()
    ratio: Level = "token"
    surrogate: Surrogate = Clip()
    correction: Correction | Literal["auto"] | None = "auto"
    normalisation: Normalisation = "token"
    credit: Literal["sample", "turn"] = "sample"
    mask_truncated: bool = False
    kl: KL | None = None
    entropy: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.normalisation, int) and self.normalisation < 1:
            raise ConfigurationError(f"normalisation={self.normalisation} must be at least 1")
        if not self.entropy >= 0:
            raise ConfigurationError(f"entropy={self.entropy} must be at least 0")

    @property
    def needs_group(self) -> bool:
        """Whether advantages compare the samples of a task, so that one sample per task would teach nothing."""
        return self.advantage.needs_group

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs under a reference policy are asked for."""
        return self.kl is not None

    @property
    def needs_whole_samples(self) -> bool:
        """Whether a token's loss depends on its sample's other tokens."""
        return self.ratio != "token" or getattr(self.correction, "level", "token") != "token"

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether a token whose advantage is zero has no gradient, so that samples without signal can be left out."""
        return self.surrogate.proportional and not self.entropy and (self.kl is None or self.kl.where == "reward")

    def on_policy(self, is_so: bool) -> Self:
        """The same with the correction that goes with a strategy, where that is ``"auto"``."""
        return self if self.correction != "auto" else replace(self, correction=None if is_so else Truncated())

    def token_loss(self, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of each token, not yet weighted or summed.

        Args:
            tokens: The tokens, in any order.

        Returns:
            Loss of each token [N], and detached float statistics of each token [N] by name, which are averaged over
            tokens and logged: ``"clip_fraction"`` (1 where the surrogate cut the gradient off or down), ``"kl"``
            (estimated KL(sampling || training) in nats), ``"reference_kl"`` and ``"correction"``, where there are such.
        """
        correction = Truncated() if self.correction == "auto" else self.correction
        log_ratios = log_ratio(tokens, self.ratio, corrected=correction is not None)
        loss, cut = self.surrogate(log_ratios, tokens.logprobs, tokens.advantages)
        now = tokens.logprobs.detach()
        statistics = {
            "clip_fraction": cut.to(loss.dtype),
            "kl": kl_divergence(tokens.sampling_logprobs, now, "k3"),
        }
        if correction is not None:
            statistics["correction"] = correction(tokens)
            loss = loss * statistics["correction"]
        if self.kl is not None and tokens.reference_logprobs is not None:
            divergence = kl_divergence(tokens.logprobs, tokens.reference_logprobs, self.kl.estimator)
            statistics["reference_kl"] = divergence.detach()
            if self.kl.where == "loss":
                if self.kl.corrected:
                    divergence = divergence * log_ratios.exp() * statistics.get("correction", 1.0)
                loss = loss + self.kl.coefficient * divergence
        if self.entropy and tokens.entropy is not None:
            loss = loss - self.entropy * tokens.entropy
        return loss, statistics
