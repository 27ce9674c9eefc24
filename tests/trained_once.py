"""Every sampled token is trained exactly once, with its own version and log-prob, whatever tree its calls make."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lightning_rft as rft
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.packing import pack
from tests.recomputed_tokens import Keep, logprobs


@dataclass(frozen=True)
class Recorded(rft.REINFORCE):
    """Keeps the log-prob that each token was sampled with whose loss has a gradient."""

    trained: list[float] = field(default_factory=list, hash=False)

    def token_loss(self, tokens: rft.TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, statistics = super().token_loss(tokens)
        sampled = tokens.sampling_logprobs
        loss.register_hook(lambda gradient: self.trained.extend(sampled[gradient != 0].tolist()))
        return loss, statistics


def free(turn: rft.Turn) -> list[float]:
    """Log-probs of the tokens that others might have taken the place of."""
    logprobs = turn.logprobs
    return (logprobs if turn.support is None else logprobs[turn.support.counts > 1]).tolist()  # type: ignore[no-any-return]


def check_once(keep: Keep, objective: Recorded, buffer: Path) -> None:
    """What had a gradient, and what the buffer says was trained, is every token of the batches."""
    assert Counter(objective.trained) == Counter(logprob for turn in keep.turns for logprob in free(turn))
    stored = [row for row in rft.read_buffer(buffer) if row["state"] == "trained"]
    assert len(stored) == len(keep.samples)
    sampled = Counter(logprob for turn in keep.turns for logprob in turn.logprobs.tolist())
    assert Counter(logprob for row in stored for turn in row["logprobs"] for logprob in turn) == sampled


def check_trees(keep: Keep) -> None:
    """The samples were such that this means something."""
    assert any(len(turn.version_runs) > 1 for turn in keep.turns), "no weights were swapped in mid-generation"
    parents = Counter((id(sample), turn.parent) for sample in keep.samples for turn in sample.turns)
    assert any(parent is not None and count > 1 for (_, parent), count in parents.items()), "no forks"


def check_logprobs(keep: Keep, policy: Any, samples_per_task: int, same: float) -> None:
    """Each token has the log-prob of its version, in its call alone, and in a row with other calls too."""
    for turn in keep.turns:
        for version, alone in _alone(turn, keep, policy).items():
            here = torch.from_numpy(turn.versions == version)
            assert (alone - torch.tensor(turn.logprobs))[here].abs().max() < same
    starts = range(0, len(keep.samples), samples_per_task)
    groups = [[turn for one in keep.samples[at : at + samples_per_task] for turn in one.turns] for at in starts]
    groups = [group for group in groups if any(len(turn.version_runs) > 1 for turn in group)][:3]
    turns = [turn for group in groups for turn in group]
    versions = torch.cat([torch.tensor(turn.versions) for turn in turns])
    by_version = [_alone(turn, keep, policy) for turn in turns]
    for shared in (False, True):
        packed = pack(groups, shared=shared)
        assert len(packed.input_ids) < len(turns)
        for version in versions.unique().tolist():
            policy.load_state_dict(keep.weights[version])
            with torch.no_grad():
                in_rows, _ = token_logprobs(policy, packed)
            apart = zip(turns, by_version, strict=True)
            alone = torch.cat([found.get(version, torch.zeros(turn.num_tokens)) for turn, found in apart])
            assert (in_rows - alone)[versions == version].abs().max() < same


def _alone(turn: rft.Turn, keep: Keep, policy: Any) -> dict[int, torch.Tensor]:
    """Log-probs of a call that is computed by itself, with each version of its tokens."""
    return {version: logprobs(policy, keep.weights[version], turn) for version, _ in turn.version_runs}
