"""Buffers of a model, which keep their dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["uncast_buffers"]


@contextmanager
def uncast_buffers(model: nn.Module | None) -> Iterator[None]:
    """Keeps the dtype of a model's buffers while it is moved and cast.

    They are rotary frequencies, and in bfloat16 they would turn the tokens of a long text to other angles than the
    explorers do.
    """
    before = [] if model is None else list(model.named_buffers())
    yield
    for name, buffer in before:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)  # type: ignore[union-attr]
        now = module.get_buffer(own)
        if now.dtype != buffer.dtype:
            module._buffers[own] = buffer.to(now.device)
