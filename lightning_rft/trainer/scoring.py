"""How the trainer scores one fixed text, which an explorer with the same weights must score alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lightning_rft.experience import TensorInfo

__all__ = ["Announcement", "Scores", "encoded_text", "score"]

_TEXT = (
    "The quick brown fox jumps over the lazy dog. 0 + 1 = 1, 2 * 3 = 6 and 12 - 5 = 7. def f(x): return [x, x ** 2]\n"
    "What is the capital of France? Paris."
)
_TOKENS = 64


@dataclass(frozen=True)
class Scores:
    """The text as token ids, and what the policy makes of it."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of all but the first
    spread: float  # standard deviation of the logits over the vocabulary: rounding errors grow with it
    dtype: str  # that was computed in


class Announcement(NamedTuple):
    """What a push begins with: the weights that will follow, on which device they are, and the scores with them."""

    manifest: list[TensorInfo]
    device: torch.device
    scores: Scores


def encoded_text(model: str) -> tuple[int, ...]:
    """The text in a model's own tokens; some ids where its tokenizer knows none of it."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model).encode(_TEXT, add_special_tokens=False)[:_TOKENS]
    return tuple(ids if len(ids) > 1 else range(8))


@torch.no_grad()
def score(policy: Any, ids: tuple[int, ...], device: torch.device) -> Scores:
    """Scores ids as an engine would, without dropout, in the precision of the surrounding context."""
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        logits = policy(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, :-1].float()
    finally:
        for module in training:
            module.training = True
    chosen = torch.tensor(ids[1:], device=device)[:, None]
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else next(policy.parameters()).dtype
    return Scores(
        ids,
        tuple(logits.log_softmax(-1).gather(-1, chosen)[:, 0].tolist()),
        float(logits.std(-1).mean()),
        str(dtype).removeprefix("torch."),
    )
