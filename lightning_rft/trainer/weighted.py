"""What depends on a whole batch, made once before it is cut: the advantage and the weight of each turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_rft.experience import Experience, Group, Turn
from lightning_rft.trainer.objectives.normalisation import token_weights
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.objectives.tokens import TokenBatch

__all__ = ["WeightedTurn", "sampled_turns", "token_batch", "versions_of", "weighted_turns"]


class WeightedTurn(NamedTuple):
    """A turn as it is trained."""

    turn: Turn
    #: Index of its group in the batch.
    group: int
    #: Index of its sample in the batch.
    sample: int
    #: Sampled tokens of its whole sample that had an alternative.
    sample_tokens: int
    advantage: float = 0.0
    #: Of each of its tokens, in the loss.
    weight: float = 0.0
    #: Log-probs of its tokens under the reference policy [n].
    reference: NDArray[np.float32] | None = None
    #: Sum of its tokens' log-ratios to the policy that sampled them, and that of its whole sample, where these lie in
    #: several micro-batches.
    drift: float = 0.0
    sample_drift: float = 0.0


def sampled_turns(groups: Sequence[Group]) -> list[WeightedTurn]:
    """Every turn of a batch that has a sampled token, group by group, without advantage and weight."""
    return [
        WeightedTurn(turn, group, sample, _length(experience))
        for sample, (group, experience) in enumerate(_samples(groups))
        for turn in experience.turns
        if turn.num_tokens
    ]


def weighted_turns(
    groups: Sequence[Group],
    objective: Objective,
    *,
    max_new_tokens: int,
    reference: Sequence[NDArray[np.float32]] | None = None,
) -> list[WeightedTurn]:
    """The turns of a batch that contribute to its gradient, group by group, with advantage and weight.

    A sample whose tokens have no weight is left out, and so is one without any advantage where it then has no gradient.
    ``reference`` holds the reference policy's log-probs of all :func:`sampled_turns`, in their order.
    """
    samples, turns = _samples(groups), sampled_turns(groups)
    group_of = torch.tensor([group for group, _ in samples])
    rewards = torch.tensor([experience.reward for _, experience in samples], dtype=torch.float64)
    if reference is not None:
        turns = [turn._replace(reference=logprobs) for turn, logprobs in zip(turns, reference, strict=True)]
        if objective.kl is not None and objective.kl.where == "reward":
            for turn, logprobs in zip(turns, reference, strict=True):
                divergence = (turn.turn.logprobs - logprobs).sum(dtype=np.float64)
                rewards[turn.sample] -= objective.kl.coefficient * float(divergence)
    if objective.credit == "sample":
        of_samples = objective.advantage(rewards, group_of).tolist()
        advantages = [of_samples[turn.sample] for turn in turns]
    else:
        returns = [float(rewards[turn.sample]) - _rewards_before(samples[turn.sample][1], turn.turn) for turn in turns]
        of_turns = torch.tensor(returns, dtype=torch.float64), torch.tensor([turn.group for turn in turns])
        advantages = objective.advantage(*of_turns).tolist()
    lengths = torch.tensor([_length(experience) for _, experience in samples])
    if objective.mask_truncated:
        cut_off = [bool(sample.turns) and sample.turns[-1].finish_reason == "length" for _, sample in samples]
        lengths = lengths.masked_fill(torch.tensor(cut_off), 0)
    weights = token_weights(lengths, group_of, objective.normalisation, max_new_tokens).masked_fill(lengths == 0, 0.0)
    has_signal = {
        turn.sample
        for turn, advantage in zip(turns, advantages, strict=True)
        if weights[turn.sample] and not (objective.skips_zero_advantage and advantage == 0.0)
    }
    return [
        turn._replace(advantage=advantage, weight=float(weights[turn.sample]))
        for turn, advantage in zip(turns, advantages, strict=True)
        if turn.sample in has_signal
    ]


def _samples(groups: Sequence[Group]) -> list[tuple[int, Experience]]:
    return [(index, experience) for index, group in enumerate(groups) for experience in group.experiences]


def _length(experience: Experience) -> int:
    """Tokens of a sample that are trained."""
    return sum(turn.num_free for turn in experience.turns)


def _rewards_before(experience: Experience, turn: Turn) -> float:
    """The rewards of the turns before one, of which it has no part."""
    index = next(index for index, other in enumerate(experience.turns) if other is turn)
    return sum(earlier.reward or 0.0 for earlier in experience.turns[:index])


def token_batch(turns: Sequence[WeightedTurn], logprobs: Tensor, entropy: Tensor) -> tuple[TokenBatch, Tensor]:
    """The tokens of a micro-batch as an objective sees them, and the weight of each [N].

    ``logprobs`` and ``entropy`` are [N], in the order of the turns; everything is made on their device.
    """
    device = logprobs.device
    counts = torch.tensor([turn.turn.num_tokens for turn in turns])
    samples = {turn.sample: turn for turn in turns}
    index_of = {sample: index for index, sample in enumerate(samples)}

    def of_tokens(values: list[float] | list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(counts).to(device)

    def joined(arrays: list[NDArray[np.float32]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    elsewhere = [turn.sample_drift for turn in samples.values()]
    for turn in turns:
        elsewhere[index_of[turn.sample]] -= turn.drift
    references = [turn.reference for turn in turns if turn.reference is not None]
    tokens = TokenBatch(
        logprobs=logprobs,
        sampling_logprobs=joined([turn.turn.logprobs for turn in turns]),
        advantages=of_tokens([turn.advantage for turn in turns]),
        sample=of_tokens([index_of[turn.sample] for turn in turns], torch.int64),
        lengths=torch.tensor([turn.sample_tokens for turn in samples.values()], device=device),
        entropy=entropy,
        elsewhere=torch.tensor(elsewhere, dtype=torch.float32, device=device),
        reference_logprobs=joined(references) if references else None,
    )
    weights = of_tokens([turn.weight for turn in turns])
    if any(turn.turn.support is not None for turn in turns):  # a token without an alternative counts for nothing
        weights = weights * joined([_free(turn.turn) for turn in turns])
    return tokens, weights


def versions_of(turns: Sequence[WeightedTurn], device: torch.device) -> Tensor:
    """The version of each token [N], in the order of the turns."""
    return torch.from_numpy(np.concatenate([turn.turn.versions for turn in turns])).to(device)


def _free(turn: Turn) -> NDArray[np.float32]:
    counts = np.full(turn.num_tokens, 2) if turn.support is None else turn.support.counts
    return (counts > 1).astype(np.float32)
