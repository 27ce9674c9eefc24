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
) -> list[Cut]:
    """The micro-batches of each part of a batch that this rank trains.

    Rank 0, which has the groups, makes the plan, and sends every rank its own share of the turns; all compute the
    passes without a gradient together.
    """
    ranks = batch.ranks
    passed = partial(logprobs_of, path=path, max_tokens=max_tokens, ranks=ranks)
    cut = partial(
        micro_batches, shares=batch.parts * ranks.count, max_tokens=max_tokens, columns=path.columns, shared=path.shared
    )
    # on other ranks there are no turns, and they only take part in the passes
    under_reference = passed(reference, sampled_turns(batch.groups)) if objective.needs_reference else None
    weighted = (
        weighted_turns(batch.groups, objective, max_new_tokens=batch.max_new_tokens, reference=under_reference)
        if batch.groups
        else []
    )
    shares = cut(weighted)
    if objective.needs_whole_samples:
        split = split_samples(shares)
        weighted = with_drift(weighted, split, partial(passed, policy))
        shares = cut(weighted) if split else shares
    return ranks.scatter("the share of a batch", lambda: [shares[rank :: ranks.count] for rank in range(ranks.count)])
