"""What sampling makes of logits, in the order in which vLLM does it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lightning_rft.experience import Truncation
from lightning_rft.explorer.engines.requests import Running
from lightning_rft.sampling import BAN, MAX_SUPPORT

__all__ = ["choices", "drawn_from"]


def drawn_from(logits: Tensor, rows: Sequence[Running], ends: Collection[int]) -> Tensor:
    """Log-probs that the next token of each row is drawn from [rows, vocab], -inf where it cannot be.

    ``logits`` are in fp32, and overwritten; ``ends`` are the ids that end any answer.
    """
    samplings = [running.request.sampling for running in rows]
    for row, running, sampling in zip(logits, rows, samplings, strict=True):
        if len(running.token_ids) < (sampling.min_new_tokens or 0):
            row[[*ends, *(sampling.stop_token_ids or ())]] = -math.inf
        for token_id, bias in (sampling.logit_bias or {}).items():
            row[token_id] += bias if bias > BAN else -math.inf
    temperatures = logits.new_tensor([sampling.temperature or 1.0 for sampling in samplings])
    logits = logits / temperatures[:, None]
    truncations = [sampling.truncation for sampling in samplings]
    truncated = [index for index, truncation in enumerate(truncations) if truncation != Truncation()]
    if truncated:
        logits[truncated] = _truncated(logits[truncated], [truncations[index] for index in truncated])
    return logits.log_softmax(-1)


def choices(logprobs: Tensor) -> dict[int, float]:
    """The ids that a token is drawn from, most likely first, with their log-probs, given all of these [vocab]."""
    values, ids = logprobs.topk(min(MAX_SUPPORT, len(logprobs)))
    kept = values.isfinite()
    return dict(zip(ids[kept].tolist(), values[kept].tolist(), strict=True))


def _truncated(logits: Tensor, truncations: Sequence[Truncation]) -> Tensor:
    top_k, top_p, min_p = (logits.new_tensor(column)[:, None] for column in zip(*truncations, strict=True))
    width = logits.shape[-1]
    if bool((top_k > 0).all()):
        width = min(width, int(top_k.max()))
    values, ids = logits.topk(width)  # most likely first
    values = values.masked_fill((values - values[:, :1]).exp() < min_p, -math.inf)
    values = values.masked_fill((torch.arange(width, device=logits.device) >= top_k) & (top_k > 0), -math.inf)
    probabilities = values.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities
    values = values.masked_fill((likelier >= top_p) & (top_p < 1), -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, ids, values)
