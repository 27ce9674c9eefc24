"""Memory for one bucket after another: to touch fresh memory for the first time costs several times a copy."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

__all__ = ["ReusedMemory"]

_KEPT = 4  # filled, read, of a layer that was not whole at its end, of a tied weight that comes once more


class ReusedMemory:
    """Lends memory, and lends it again when no tensor refers to it any more.

    An engine may keep what it was given: vLLM copies a layer's tensors when all of them have come, which may be some
    buckets later.

    Args:
        least: Bytes of the smallest piece, so that one that was made for a small bucket fits others.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._pieces: list[tuple[np.ndarray[Any, Any], weakref.ref[np.ndarray[Any, Any]]]] = []

    def take(self, size: int) -> torch.Tensor:
        """Bytes with any contents, which are the caller's for as long as this tensor, or any view of it, lives.

        Example:
            >>> memory = ReusedMemory(least=16)
            >>> first = memory.take(8)
            >>> view, place = first[4:].view(torch.float32), first.data_ptr()
            >>> del first
            >>> memory.take(8).data_ptr() == place, view.numel()
            (False, 1)
            >>> del view
            >>> memory.take(16).data_ptr() == place
            True
        """
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
