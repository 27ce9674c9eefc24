"""Memory that is lent for one bucket after another: touching fresh memory for the first time costs several copies."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

__all__ = ["ReusedMemory"]

_KEPT = 4  # one being filled, one being read, one of a layer still incomplete, one of a tied weight needed again


class ReusedMemory:
    """Lends memory in pieces of at least ``least`` bytes, and lends a piece again when no tensor refers to it any more.

    An engine may keep a bucket: vLLM copies a layer's tensors when all of them have come, some buckets later.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._pieces: list[tuple[np.ndarray[Any, Any], weakref.ref[np.ndarray[Any, Any]]]] = []

    def take(self, size: int) -> torch.Tensor:
        """Uninitialised bytes, which are the caller's for as long as this tensor, or any view of it, lives."""
        lent = [piece for piece in self._pieces if piece[1]() is not None]
        free = [piece for piece in self._pieces if piece[1]() is None][:_KEPT]
        fits = [piece for piece in free if piece[0].nbytes >= size]
        if fits:
            chosen = min(fits, key=lambda piece: piece[0].nbytes)
            free = [piece for piece in free if piece is not chosen]
            whole = chosen[0]
        else:
            whole = np.empty(max(size, self._least), np.uint8)
        part = whole[:size]  # an object of its own, which lives as long as the tensor's storage
        self._pieces = [*free, *lent, (whole, weakref.ref(part))]
        return torch.from_numpy(part)
