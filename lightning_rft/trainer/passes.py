"""Passes without a gradient over a whole batch: what a policy makes of every turn, by all ranks and for rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.micro_batches import Cut, by_group, micro_batches
from lightning_rft.trainer.ranks import Ranks
from lightning_rft.trainer.shortcuts import FastPath
from lightning_rft.trainer.weighted import WeightedTurn

__all__ = ["logprobs_of", "with_drift"]


@torch.no_grad()
def logprobs_of(
    model: Any, turns: Sequence[WeightedTurn], path: FastPath, *, max_tokens: int | None, ranks: Ranks
) -> list[NDArray[np.float32]]:
    """A model's log-probs of the tokens of each turn [n], in the order of ``turns``.

    Rank 0 has the turns, and gets the log-probs; every rank computes a share, so all must call it together. With fewer
    turns than ranks some turns are computed twice.
    """

    def shares() -> list[Cut]:
        numbered = [turn._replace(sample=index) for index, turn in enumerate(turns)]
        cut = micro_batches(numbered, ranks.count, max_tokens=max_tokens, columns=path.columns, shared=path.shared)
        # a sharded model's forward is a collective
        return [[piece or numbered[:1] for piece in share] if numbered else [] for share in cut]

    found: dict[int, NDArray[np.float32]] = {}
    share = ranks.scatter("the share of a pass", shares)
    for piece in share:
        packed = path.pack(by_group(piece)).to(model.device)
        logprobs, _ = token_logprobs(model, packed, chunked_head=path.chunked_head)
        ends = np.cumsum([turn.turn.num_tokens for turn in piece])[:-1]
        values = np.split(logprobs.float().cpu().numpy(), ends)
        found.update((turn.sample, of_turn) for turn, of_turn in zip(piece, values, strict=True))
    if share and ranks.count > 1:
        everyone: list[Any] | None = [None] * ranks.count if ranks.leads else None
        torch.distributed.gather_object(found, everyone)
        found = {index: values for of_rank in everyone or () for index, values in of_rank.items()}
    return [found[index] for index in range(len(turns))]


def with_drift(
    turns: Sequence[WeightedTurn],
    samples: Set[int],
    passed: Callable[[Sequence[WeightedTurn]], list[NDArray[np.float32]]],
) -> list[WeightedTurn]:
    """The turns with the drift of those of some samples, for which ``passed`` gives the policy's log-probs."""
    chosen = [turn for turn in turns if turn.sample in samples]
    drifts = [
        float((logprobs - turn.turn.logprobs).sum(dtype=np.float64))
        for turn, logprobs in zip(chosen, passed(chosen), strict=True)
    ]
    whole = dict.fromkeys(samples, 0.0)
    for turn, drift in zip(chosen, drifts, strict=True):
        whole[turn.sample] += drift
    left = iter(drifts)
    return [
        turn._replace(drift=next(left), sample_drift=whole[turn.sample]) if turn.sample in samples else turn
        for turn in turns
    ]
