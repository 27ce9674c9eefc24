"""How weights pass through a bucket of a fixed size: tensors side by side, and one that does not fit piece by piece."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_rft.experience import TensorInfo

__all__ = ["Piece", "pieces"]

_ALIGNED = 16  # bytes, so that every piece can be viewed in its own dtype


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of a tensor, which lie in the bucket from byte ``offset`` on."""

    info: TensorInfo
    start: int
    stop: int
    offset: int

    @property
    def first(self) -> bool:
        """Whether its tensor begins with it."""
        return self.start == 0

    @property
    def last(self) -> bool:
        """Whether its tensor ends with it."""
        return self.stop == math.prod(self.info.shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of its tensor."""
        dtype: torch.dtype = getattr(torch, self.info.dtype)
        return dtype

    @property
    def end(self) -> int:
        """Where it ends in the bucket, in bytes."""
        return self.offset + (self.stop - self.start) * self.dtype.itemsize

    def view(self, bucket: torch.Tensor) -> torch.Tensor:
        """Its elements in a bucket of bytes."""
        return bucket[self.offset : self.end].view(self.dtype)


def pieces(manifest: Sequence[TensorInfo], limit: int) -> list[list[Piece]]:
    """Cuts a manifest, without its aliases, into what the bucket of ``limit`` bytes holds at a time.

    Both halves compute it from the same manifest, so the cuts need not travel.

    Example:
        >>> manifest = [TensorInfo(name, "float32", (6,)) for name in "ab"]
        >>> [[(piece.info.name, piece.start, piece.stop) for piece in held] for held in pieces(manifest, limit=32)]
        [[('a', 0, 6)], [('b', 0, 6)]]
        >>> [[(piece.info.name, piece.start, piece.stop) for piece in held] for held in pieces(manifest, limit=16)]
        [[('a', 0, 4)], [('a', 4, 6)], [('b', 0, 4)], [('b', 4, 6)]]
    """
    cut: list[list[Piece]] = []
    offset = limit
    for info in manifest:
        if info.same_as is not None:
            continue
        size, start, stop = math.prod(info.shape), 0, -1
        itemsize = Piece(info, 0, 0, 0).dtype.itemsize
        most = limit // itemsize
        while stop < size:
            fits = (limit - offset) // itemsize
            if fits < min(size, most) or not cut:  # it begins, or goes on, in an empty bucket
                cut.append([])
                offset, fits = 0, most
            stop = min(size, start + fits)
            piece = Piece(info, start, stop, offset)
            cut[-1].append(piece)
            offset = -(-piece.end // _ALIGNED) * _ALIGNED
            start = stop
    return cut
