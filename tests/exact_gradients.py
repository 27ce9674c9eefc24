"""What objectives do to a policy whose answers are all enumerated: the papers' formulas, summed over all batches.

Gradients are those of what is to rise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import lightning_rft as rft
from lightning_rft.trainer.objectives.objective import Objective
from tests.every_answer import ANSWERS, CUT_OFF, LENGTHS, LONGEST, POLICY, REWARDS, TablePolicy


@dataclass(frozen=True)
class Ratios:
    """The policy's over those of the one that sampled, of each answer's tokens and of all of it."""

    token: Tensor
    mean: Tensor
    whole: Tensor


@dataclass(frozen=True)
class Formula:
    """Advantages and weights [batches, groups, samples], and what pulls at each token's log-prob [..., places]."""

    advantage: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    pull: Callable[[Ratios, Tensor], Tensor]
    leaves_out_cut_off: bool = False

    def expected(self, by: TablePolicy = POLICY, groups: int = 1, samples: int = 2) -> Tensor:
        batches = torch.cartesian_prod(*[torch.arange(len(ANSWERS))] * (groups * samples)).view(-1, groups, samples)
        log_ratios = POLICY.logprobs - by.logprobs
        total = log_ratios.sum(-1, keepdim=True)
        ratios = Ratios(log_ratios.exp(), (total / LENGTHS[:, None]).exp(), total.exp())
        of_batches = Ratios(ratios.token[batches], ratios.mean[batches], ratios.whole[batches])
        pulls = self.pull(of_batches, self.advantage(REWARDS[batches])[..., None])
        kept = ~CUT_OFF[batches] if self.leaves_out_cut_off else torch.ones_like(batches, dtype=torch.bool)
        weights = self.weight(LENGTHS[batches].double() * kept) * kept
        weights = weights * by.chances[batches].prod(-1).prod(-1)[:, None, None]
        of_answers = torch.zeros(len(ANSWERS), LONGEST, dtype=torch.float64)
        of_answers.index_add_(
            0, batches.flatten(), (weights[..., None] * pulls.expand(*batches.shape, 3)).flatten(0, 2)
        )
        return torch.einsum("at,atl->l", of_answers, POLICY.scores)


def raw(rewards: Tensor) -> Tensor:
    return rewards


def above_the_others(rewards: Tensor) -> Tensor:
    return rewards - (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)


def centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean(-1, keepdim=True)


def shifted(rewards: Tensor) -> Tensor:
    return centred(rewards) + 0.1


def standardised(rewards: Tensor) -> Tensor:
    return centred(rewards) / (rewards.std(-1, keepdim=True) + 1e-4)


def standardised_in_batch(rewards: Tensor) -> Tensor:
    return standardised(rewards.flatten(1)).view_as(rewards)


def over_deviation_of_batch(rewards: Tensor) -> Tensor:
    return centred(rewards) / (rewards.flatten(1).std(-1) + 1e-4)[:, None, None]


def per_sample(lengths: Tensor) -> Tensor:
    return torch.ones_like(lengths) / lengths[0].numel()


def per_sequence(lengths: Tensor) -> Tensor:
    return per_sample(lengths) / lengths


def per_constant(lengths: Tensor) -> Tensor:
    return per_sample(lengths) / LONGEST


def per_token(lengths: Tensor) -> Tensor:
    return torch.ones_like(lengths) / lengths.sum((1, 2), keepdim=True).clamp(min=1)


def per_group(lengths: Tensor) -> Tensor:
    return torch.ones_like(lengths) / lengths.sum(2, keepdim=True) / lengths.shape[1]


def clipped(ratio: Tensor, advantage: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    cut = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & ((ratio < 1 - low) | (ratio > 3)))
    return ratio * advantage * ~cut


def gated(ratio: Tensor, advantage: Tensor) -> Tensor:
    slope = torch.where(advantage > 0, 1.0, 1.05)
    return 4 * ratio * advantage * torch.sigmoid(slope * (ratio - 1)) * torch.sigmoid(-slope * (ratio - 1))


def tapered(ratio: Tensor, advantage: Tensor) -> Tensor:
    return torch.where(advantage > 0, 1.0, ratio.clamp(max=1)) * advantage


def peaked(ratio: Tensor, advantage: Tensor) -> Tensor:
    good, bad = ratio**2 * torch.exp(3 * (1 - ratio)), ratio**3 * torch.exp(2 * (1 - ratio))
    return torch.where(advantage > 0, good, bad) * advantage


def truncated(ratios: Ratios, advantage: Tensor) -> Tensor:
    return ratios.token.clamp(max=2) * advantage


FORMULAS: dict[type[Objective], Formula] = {
    rft.GRPO: Formula(standardised, per_sequence, lambda r, a: clipped(r.token, a)),
    rft.DrGRPO: Formula(centred, per_constant, lambda r, a: clipped(r.token, a)),
    rft.DAPO: Formula(standardised, per_token, lambda r, a: clipped(r.token, a, high=0.28), leaves_out_cut_off=True),
    rft.GSPO: Formula(standardised, per_sequence, lambda r, a: clipped(r.mean, a, 3e-4, 4e-4)),
    rft.CISPO: Formula(standardised, per_token, lambda r, a: r.token.clamp(max=5) * a),
    rft.SAPO: Formula(standardised, per_sequence, lambda r, a: gated(r.token, a)),
    rft.VESPO: Formula(standardised, per_token, lambda r, a: peaked(r.whole, a)),
    rft.RLOO: Formula(above_the_others, per_sample, lambda r, a: clipped(r.whole, a)),
    rft.REINFORCE: Formula(raw, per_sample, lambda r, a: a),
    rft.REINFORCEPlusPlus: Formula(standardised_in_batch, per_token, lambda r, a: clipped(r.token, a)),
    rft.OPMD: Formula(centred, per_sample, lambda r, a: a - 0.1 * r.whole.log()),
    rft.AsymRE: Formula(shifted, per_sample, lambda r, a: a),
    rft.TOPR: Formula(centred, per_sample, lambda r, a: tapered(r.whole, a)),
}
