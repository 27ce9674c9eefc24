"""REINFORCE and its relatives: policy gradients with a baseline in place of a value function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_rft.trainer.objectives.advantages import Advantage, BatchRelative, GroupRelative, LeaveOneOut, Raw
from lightning_rft.trainer.objectives.corrections import Correction
from lightning_rft.trainer.objectives.normalisation import Normalisation
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.objectives.surrogates import Likelihood, Squared, StopGradient, Surrogate
from lightning_rft.trainer.objectives.tokens import Level

__all__ = ["OPMD", "REINFORCE", "RLOO", "TOPR", "AsymRE", "REINFORCEPlusPlus"]


@dataclass(frozen=True)
class REINFORCE(Objective):
    """The plain policy gradient, `Williams 1992 <https://doi.org/10.1007/BF00992696>`_.

    ``-mean over samples of reward * log p(sample)``: unbiased on policy, with the most variance of all.
    """

    advantage: Advantage = Raw()
    surrogate: Surrogate = Likelihood()
    normalisation: Normalisation = 1


@dataclass(frozen=True)
class RLOO(Objective):
    """REINFORCE leave-one-out, `Ahmadian et al. 2024 <https://arxiv.org/abs/2402.14740>`_.

    ``-mean over samples of min(r * A, clip(r) * A)`` with the ratio r of the whole sample, ``A = reward - mean of the
    others``. Unbiased on policy. A penalty belongs into the reward: ``kl=KL(0.05, "k1", "reward")``.
    """

    advantage: Advantage = LeaveOneOut()
    ratio: Level = "product"
    normalisation: Normalisation = "sequence"


@dataclass(frozen=True)
class REINFORCEPlusPlus(Objective):
    """REINFORCE++, `Hu et al. 2025 <https://arxiv.org/abs/2501.03262>`_.

    ``-mean over tokens of min(r * A, clip(r) * A)``, ``A = (reward - mean) / std`` of the whole batch: no critic, and
    no groups. Its penalty is ``kl=KL(0.01, "k1", "reward")``.
    """

    advantage: Advantage = BatchRelative()


@dataclass(frozen=True)
class OPMD(Objective):
    """Online policy mirror descent, `Kimi k1.5, 2025 <https://arxiv.org/abs/2501.12599>`_.

    ``mean over samples of -A * log p(sample) + strength / 2 * (log r)^2`` with the ratio r of the whole sample,
    ``A = reward - mean`` of the group. Holds off policy without importance weights.
    """

    advantage: Advantage = GroupRelative(scale=None)
    ratio: Level = "product"
    surrogate: Surrogate = Squared()
    correction: Correction | Literal["auto"] | None = None
    normalisation: Normalisation = 1


@dataclass(frozen=True)
class AsymRE(Objective):
    """Asymmetric REINFORCE, `Arnal et al. 2025 <https://arxiv.org/abs/2506.20520>`_.

    ``-mean over samples of A * log p(sample)``, ``A = reward - mean + shift``: off policy and without importance
    weights it stays stable as long as the baseline lies below the mean, so that what is good counts for more than what
    is bad.
    """

    advantage: Advantage = GroupRelative(scale=None, shift=0.1)
    surrogate: Surrogate = Likelihood()
    correction: Correction | Literal["auto"] | None = None
    normalisation: Normalisation = 1


@dataclass(frozen=True)
class TOPR(Objective):
    """Tapered off-policy REINFORCE, `Le Roux et al. 2025 <https://arxiv.org/abs/2503.14286>`_.

    ``-mean over samples of w * A * log p(sample)``, where w is 1 for good samples and ``min(r, 1)`` for bad ones, with
    the ratio r of the whole sample: what is bad is pushed away only as far as the policy would still say it.
    """

    advantage: Advantage = GroupRelative(scale=None)
    ratio: Level = "product"
    surrogate: Surrogate = StopGradient(positive=(1.0, 1.0), negative=(0.0, 1.0))
    correction: Correction | Literal["auto"] | None = None
    normalisation: Normalisation = 1
