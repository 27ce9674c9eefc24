"""The two halves of a weight transport as an engine sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from lightning_rft.experience import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["WeightLink", "WeightReceiver"]


class WeightReceiver(Protocol):
    """The receiving half of a transport, in the process that holds the engine's weights."""

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every tensor of the manifest, in order; what anything refers to keeps its contents."""
        ...

    def close(self) -> None:
        """Leaves the transport; safe to call twice."""
        ...


class WeightLink(Protocol):
    """A picklable invitation from a transport; opening it makes the receiver."""

    def open(self, member: int) -> WeightReceiver:
        """Joins as the ``member``-th weight-holding process of this engine (0 unless tensor-parallel)."""
        ...
