"""The peak memory of one micro-batch: counted without computing it, and predicted by a formula.

Beyond weights, gradients and optimizer state, for decoders as Llama's (RMS norm, gated MLP, rotary positions) under
attention that holds no scores (sdpa). The count runs the trainer's own forward and backward on tensors without
contents, so it takes seconds at any size.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_rft.trainer.linear_logprobs import LogitTransform, chunk_tokens
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.packing import Packed

__all__ = ["PRECISIONS", "counted", "predicted"]


@dataclass(frozen=True)
class Precision:
    """Bytes a column, counted from what the backward pass of one layer needs."""

    residual: int  # times the hidden size: what enters a layer
    hidden: int  # times the hidden size: norms, queries, attention's output
    keys: int  # times the keys' size: keys and values
    inner: int  # times the MLP's inner size
    flight: int  # times the MLP's inner size: gradients, while they are made
    copies: int = 0  # of a weight, that autocast keeps
    half: int = 0  # of a weight or its gradient, where it is in half precision


PRECISIONS = {
    "32-true": Precision(residual=4, hidden=32, keys=8, inner=16, flight=8),
    "bf16-mixed": Precision(residual=4, hidden=30, keys=4, inner=8, flight=4, copies=2, half=2),
    "bf16-true": Precision(residual=2, hidden=20, keys=4, inner=8, flight=4, half=2),
}
_NORM = 24  # bytes times the hidden size: the last norm's backward, in fp32


def predicted(config: Any, columns: int, tokens: int, *, precision: str, checkpointing: bool) -> int:
    """Bytes at the peak of a micro-batch's forward and backward, the mask of shared rows aside.

    ``columns`` are all of its rows' (rows x width), ``tokens`` those that are trained; ``precision`` is Lightning's.
    """
    size = PRECISIONS[precision]
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer = size.hidden * hidden + size.keys * keys + size.inner * inner
    flight = 4 * hidden + size.flight * inner
    copies = size.copies * hidden * (2 * queries + 2 * keys + 3 * inner)  # of a layer's weights
    head = config.vocab_size * hidden
    # A tied head's gradient waits for that of the embeddings.
    waiting = size.residual * head if config.tie_word_embeddings else 0
    if checkpointing:
        kept = columns * layers * size.residual * hidden
        in_layer = kept + columns * (layer + flight - size.residual * hidden) + copies + waiting
    else:
        kept = columns * layers * layer
        in_layer = kept + columns * max(_NORM * hidden, flight) + layers * copies + waiting
    chunk = 4 * config.vocab_size * min(tokens, chunk_tokens(config.vocab_size, torch.device("cpu")))
    forward = kept + columns * _NORM * hidden + 3 * chunk + size.half * head + layers * copies
    backward = kept + columns * 3 * size.residual * hidden + 2 * chunk + (4 + size.half) * head  # summed in fp32
    if not checkpointing:
        backward += layers * copies
    return max(in_layer, forward, backward, 2 * waiting)


def counted(config: Any, packed: Packed, *, precision: str, checkpointing: bool) -> int:
    """What :func:`predicted` predicts, the mask included, counted tensor by tensor.

    Too much for tied weights beside few columns: their two gradients are added in place when they have contents.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with FakeTensorMode() as fake, contextlib.ExitStack() as stack:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tensors = {name: fake.from_tensor(tensor) for name, tensor in vars(packed).items() if tensor is not None}
        # transformers cannot look at positions without contents, and would take every row for several texts
        stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", lambda _: None))
        peak = stack.enter_context(
            _Peak([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())])
        )
        with autocast:
            logprobs, _ = token_logprobs(model, replace(packed, **tensors), chunked_head=LogitTransform())
        logprobs.sum().backward()
    return peak.most + (0 if packed.attention_mask is None else packed.attention_mask.nbytes)


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made within it hold at a time."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.most = self._held = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self._held += storage.nbytes()
            self.most = max(self.most, self._held)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self._held -= self._sizes.pop(key)
