"""Base class of objectives, which turn rewards into advantages, and advantages into a loss per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Objective"]


@dataclass(frozen=True)
class Objective(ABC):
    """Base class of objectives: subclass it as a frozen dataclass whose fields are its settings.

    The caller sums the token losses and divides by the number of trained tokens of the whole batch, over all
    micro-batches and ranks: every token has the same weight, however the batch is cut up.
    """

    @property
    @abstractmethod
    def needs_group(self) -> bool:
        """Whether advantages compare the samples of a task, so that one sample per task would teach nothing."""

    @property
    @abstractmethod
    def skips_zero_advantage(self) -> bool:
        """Whether a token whose advantage is zero has no gradient, so that groups without signal can be left out."""

    @abstractmethod
    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Computes the advantage of each sample, which all of its tokens get.

        Args:
            rewards: Score of each sample [S], float64, since a reward may be beyond float32.
            groups: Which group each sample belongs to [S], int64.

        Returns:
            Advantages [S], detached.
        """

    @abstractmethod
    def token_loss(
        self, logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of each token, not yet summed or divided.

        Args:
            logprobs: Natural-log probabilities under the policy in training [N], differentiable.
            sampling_logprobs: The same under the policy that sampled each token [N].
            advantages: Advantage of each token [N].

        Returns:
            Loss of each token [N], and detached float statistics of each token [N] by name, which are averaged over
            tokens and logged, such as ``"clip_fraction"`` (1 where clipping removed the gradient, else 0) and ``"kl"``
            (estimated KL(sampling || training) in nats).
        """
