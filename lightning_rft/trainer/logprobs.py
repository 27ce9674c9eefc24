"""Log-probabilities and entropies of the trained tokens, where possible without holding all logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_rft.trainer.linear_logprobs import LogitTransform, chunk_tokens, linear_logprobs, outside
from lightning_rft.trainer.packing import Packed

__all__ = ["kept_logits", "replaced_forward", "token_logprobs"]


def token_logprobs(
    model: nn.Module, packed: Packed, *, chunked_head: LogitTransform | None = None, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each trained token and entropy of the distribution that it was drawn from, in nats.

    Both are [N] in float32 and in the order of ``packed.target``; the entropies have a gradient if
    ``entropy_gradient``. The softmax is computed in fp32, chunk by chunk, and recomputed in the backward pass. So are
    the logits with ``chunked_head``, which says what the model makes of its output head's (see
    :func:`~lightning_rft.trainer.shortcuts.probe`); without it those of all tokens are held, in the model's dtype.
    """
    if chunked_head is not None:
        return _inside_head(model, packed, chunked_head, entropy_gradient)
    logits = kept_logits(model, packed)
    # Gathered once and then split: indexing inside the chunks would make a gradient of all logits for each chunk.
    tensors = logits[packed.row, packed.column], packed.target, packed.temperature, packed.support
    size = chunk_tokens(logits.shape[-1], logits.device)
    split = [None if tensor is None else torch.split(tensor, size) for tensor in tensors]
    chunks = zip_longest(*(parts or () for parts in split))
    chunk = partial(_chunk, entropy_gradient=entropy_gradient)
    parts = [checkpoint(chunk, *tensors, use_reentrant=False, preserve_rng_state=False) for tensors in chunks]
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def kept_logits(model: nn.Module, packed: Packed) -> Tensor:
    """The model's logits of the kept columns, [R, K, V] unless its head was replaced."""
    logits: Tensor = model(
        input_ids=packed.input_ids,
        attention_mask=None if packed.attention_mask is None else _as_queries(packed.attention_mask),
        position_ids=packed.position_ids,
        logits_to_keep=packed.keep,
        use_cache=False,
    ).logits
    return logits


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replaces a module's forward within this context; its hooks still run."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def _inside_head(
    model: Any, packed: Packed, transform: LogitTransform, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Has the head compute log-probs instead of logits.

    Inside the model's forward, because only there a sharded model (FSDP2) has its weights gathered. Zeros that depend
    on the log-probs leave the model in place of the logits, because its hooks look for gradients there.
    """
    head = model.get_output_embeddings()
    computed: list[tuple[Tensor, Tensor]] = []

    def logprobs(hidden: Tensor) -> Tensor:
        chosen = hidden[packed.row, packed.column]
        computed.append(
            linear_logprobs(
                chosen,
                head.weight,
                head.bias,
                packed.target,
                temperature=packed.temperature,
                support=packed.support,
                transform=transform,
                entropy_gradient=entropy_gradient,
            )
        )
        return (computed[0][0] * 0)[None, :, None]

    with replaced_forward(head, logprobs):
        zeros = kept_logits(model, packed)
    ((values, entropy),) = computed
    return values + zeros[0, :, 0], entropy


def _chunk(
    logits: Tensor, target: Tensor, temperature: Tensor | None, support: Tensor | None, *, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if temperature is not None:
        logits = logits / temperature[:, None]
    if support is not None:
        logits = logits.masked_fill(outside(support, logits.shape[-1]), -math.inf)
    scores = torch.log_softmax(logits, dim=-1)
    logprobs = scores.gather(-1, target[:, None])[:, 0]
    # Last, because recomputation in backward stops at the last tensor it needs, without the gradient before this.
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        # -inf keeps a token from being sampled; times its probability, 0, it would be NaN
        finite = scores.clamp(min=torch.finfo(torch.float32).min)
        entropy = -(finite.exp() * finite).sum(-1)
    return logprobs, entropy


def _as_queries(mask: Tensor) -> Tensor:
    """An additive mask in the dtype that autocast gives the queries; attention goes wrong when the two differ."""
    device = mask.device.type
    if not torch.is_autocast_enabled(device):
        return mask
    dtype = torch.get_autocast_dtype(device)
    # The lowest fp32 would become -inf.
    return mask.clamp(min=torch.finfo(dtype).min).to(dtype)
