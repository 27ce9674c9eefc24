"""GRPO and its relatives: clipped surrogates on group-relative advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_rft.renamed import MOVED_IN_GRPO, refuses_old_names
from lightning_rft.trainer.objectives.advantages import Advantage, GroupRelative
from lightning_rft.trainer.objectives.corrections import Correction
from lightning_rft.trainer.objectives.normalisation import Normalisation
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.objectives.surrogates import Clip, Gamma, SoftGate, StopGradient, Surrogate
from lightning_rft.trainer.objectives.tokens import Level

__all__ = ["CISPO", "DAPO", "GRPO", "GSPO", "SAPO", "VESPO", "DrGRPO"]


@dataclass(frozen=True)
class GRPO(Objective):
    """Group relative policy optimisation, `Shao et al. 2024 <https://arxiv.org/abs/2402.03300>`_.

    ``-mean over samples of mean over tokens of min(r * A, clip(r) * A)``, ``A = (reward - mean) / std`` of the group.
    Assumes that a sample's length says nothing of its worth. The paper's penalty is ``kl=KL(0.04)``; most leave it out.
    """

    normalisation: Normalisation = "sequence"


GRPO.__init__ = refuses_old_names(GRPO.__init__, MOVED_IN_GRPO)  # type: ignore[method-assign]


@dataclass(frozen=True)
class DrGRPO(Objective):
    """GRPO done right, `Liu et al. 2025 <https://arxiv.org/abs/2503.20783>`_.

    ``-sum over tokens of min(r * A, clip(r) * A) / (samples * max_new_tokens)``, ``A = reward - mean`` of the group:
    without the divisions by a sample's length and by the group's deviation, which favour long wrong answers, and tasks
    that are almost solved or almost hopeless.
    """

    advantage: Advantage = GroupRelative(scale=None)
    normalisation: Normalisation = "constant"


@dataclass(frozen=True)
class DAPO(Objective):
    """Decoupled clip, `Yu et al. 2025 <https://arxiv.org/abs/2503.14476>`_.

    ``-mean over tokens of min(r * A, clip(r) * A)`` with more room upwards, so that rare tokens can become likely, and
    without the samples that were cut off. Its dynamic sampling is ``Buffer(group_filter=rft.has_signal)``.
    """

    surrogate: Surrogate = Clip(high=0.28)
    mask_truncated: bool = True


@dataclass(frozen=True)
class GSPO(Objective):
    """Group sequence policy optimisation, `Zheng et al. 2025 <https://arxiv.org/abs/2507.18071>`_.

    ``-mean over samples of min(s * A, clip(s) * A)``: GRPO with one ratio s for all of a sample, the geometric mean of
    its tokens' ratios, and a clipping range to match.
    Assumes that the sample is what is rewarded, so the sample is what must be corrected; mixtures of experts, whose
    tokens' ratios jump, need it.
    """

    ratio: Level = "sequence"
    surrogate: Surrogate = Clip(low=3e-4, high=4e-4)
    normalisation: Normalisation = "sequence"


@dataclass(frozen=True)
class CISPO(Objective):
    """Clipped importance sampling weights, `MiniMax 2025 <https://arxiv.org/abs/2506.13585>`_.

    ``-mean over tokens of sg(min(r, 5)) * A * log p``: the weight is clipped, not the gradient, so that no token is
    lost, rare ones at forks of the reasoning least of all.
    """

    surrogate: Surrogate = StopGradient()


@dataclass(frozen=True)
class SAPO(Objective):
    """Soft adaptive policy optimisation, `Gao et al. 2025 <https://arxiv.org/abs/2511.20347>`_.

    ``-mean over samples of mean over tokens of sigmoid(t * (r - 1)) * 4 / t * A``: the gradient fades out with the
    distance from the policy that sampled in place of ending at a clip, sooner for negative advantages.
    """

    surrogate: Surrogate = SoftGate()
    normalisation: Normalisation = "sequence"


@dataclass(frozen=True)
class VESPO(Objective):
    """Variational sequence-level soft policy optimisation, `Shen et al. 2026 <https://arxiv.org/abs/2602.10693>`_.

    ``-mean over tokens of sg(f(r)) * A * log p`` with the ratio r of the whole sample, and f falling on both sides of
    1.
    """

    ratio: Level = "product"
    surrogate: Surrogate = Gamma()
    correction: Correction | Literal["auto"] | None = None
