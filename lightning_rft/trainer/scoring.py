"""How the trainer scores one fixed text, which an explorer with the same weights must score alike."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lightning_rft.experience import TensorInfo
from lightning_rft.model_folder import Pretrained
from lightning_rft.trainer.lora import as_pushed, has_adapter, switched_off

__all__ = ["Announcement", "ProofText", "Scores", "encoded_text", "score"]

_TEXT = (
    "The quick brown fox jumps over the lazy dog. 0 + 1 = 1, 2 * 3 = 6 and 12 - 5 = 7. def f(x): return [x, x ** 2]\n"
    "What is the capital of France? Paris."
)
_TOKENS = 32  # enough for a mean; both sides pay for each of them at every push


@dataclass(frozen=True)
class Scores:
    """The text as token ids, and what the policy makes of it."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of all but the first
    spread: float  # standard deviation of the logits over the vocabulary: rounding errors grow with it
    dtype: str  # that was computed in
    #: With an adapter: log-probs of all but the first with the weights that are pushed, and with the base model's.
    pushed_and_base: tuple[tuple[float, ...], tuple[float, ...]] | None = None


class Announcement(NamedTuple):
    """What a push begins with: the weights that will follow, on which device they are, and the text to be scored."""

    manifest: list[TensorInfo]
    device: torch.device
    text_ids: tuple[int, ...]
    trained: Set[str] | None = None  # names of the weights that training changes; None for all


class ProofText:
    """The text in a model's own tokens, scored whenever weights were pushed."""

    def __init__(self, model: Pretrained) -> None:
        self.ids = encoded_text(model)
        self._base: dict[str, tuple[float, ...]] = {}  # an adapter's base model's scores, by the engines' dtype

    def score(self, policy: Any, device: torch.device, engine_dtype: str) -> Scores:
        """Scores it, and an adapter's base model only once."""
        scores = score(policy, self.ids, device, engine_dtype, self._base.get(engine_dtype))
        if scores.pushed_and_base is not None:
            self._base[engine_dtype] = scores.pushed_and_base[1]
        return scores


def encoded_text(model: Pretrained) -> tuple[int, ...]:
    """The text in a model's own tokens; some ids where its tokenizer knows none of it."""
    ids = model.tokenizer().encode(_TEXT, add_special_tokens=False)[:_TOKENS]
    return tuple(ids if len(ids) > 1 else range(8))


@torch.no_grad()
def score(
    policy: Any,
    ids: tuple[int, ...],
    device: torch.device,
    engine_dtype: str = "float32",
    base: tuple[float, ...] | None = None,
) -> Scores:
    """Scores ids as an engine would, without dropout, in the precision of the surrounding context.

    ``base`` are the log-probs of an adapter's base model, once they are known: training does not change them.
    """
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    pushed_and_base = None
    try:
        logprobs, spread = _logprobs(policy, ids, device)
        if has_adapter(policy):
            with as_pushed(policy, getattr(torch, engine_dtype)):
                pushed, _ = _logprobs(policy, ids, device)
                if base is None:
                    with switched_off(policy):
                        base, _ = _logprobs(policy, ids, device)
                pushed_and_base = pushed, base
    finally:
        for module in training:
            module.training = True
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else next(policy.parameters()).dtype
    return Scores(ids, logprobs, spread, str(dtype).removeprefix("torch."), pushed_and_base)


def _logprobs(policy: Any, ids: tuple[int, ...], device: torch.device) -> tuple[tuple[float, ...], float]:
    """Those of all ids but the first, and the logits' standard deviation over the vocabulary."""
    logits = policy(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, :-1].float()
    chosen = torch.tensor(ids[1:], device=device)[:, None]
    return tuple(logits.log_softmax(-1).gather(-1, chosen)[:, 0].tolist()), float(logits.std(-1).mean())
