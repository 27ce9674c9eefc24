"""The plan of a batch: advantages and weights, made once, and the micro-batches that it is trained in."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_rft.trainer.loader import BatchPart
from lightning_rft.trainer.micro_batches import Cut, micro_batches, split_samples
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.passes import logprobs_of, with_drift
from lightning_rft.trainer.shortcuts import FastPath
from lightning_rft.trainer.weighted import sampled_turns, weighted_turns

__all__ = ["planned"]


def planned(
    batch: BatchPart,
    objective: Objective,
    path: FastPath,
    policy: Any,
    reference: Any = None,
    *,
    max_tokens: int | None,
    rank: int,
    ranks: int,
) -> list[Cut]:
    """The micro-batches of each share of a batch: for each part those of all ranks, one after another.

    Every rank makes the same plan from the same groups; they compute the passes without a gradient together.
    """
    passed = partial(logprobs_of, path=path, max_tokens=max_tokens, rank=rank, ranks=ranks)
    turns = sampled_turns(batch.groups)
    under_reference = passed(reference, turns) if objective.needs_reference and turns else None
    weighted = weighted_turns(batch.groups, objective, max_new_tokens=batch.max_new_tokens, reference=under_reference)
    cut = partial(
        micro_batches, shares=batch.parts * ranks, max_tokens=max_tokens, columns=path.columns, shared=path.shared
    )
    shares = cut(weighted)
    split = split_samples(shares) if objective.needs_whole_samples else set()
    return cut(with_drift(weighted, split, partial(passed, policy))) if split else shares
