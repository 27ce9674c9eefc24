"""The order of two streams of a GPU: weights are packed after the trainer has made them, and live until they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_rft.sync.transports.transport import Named, Weights

__all__ = ["Packing"]


class Packing:
    """The packing of weights of a ``device``, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None

    def begin(self, weights: Weights) -> Iterator[Named]:
        """Yields weights; called on the thread that makes them."""
        # the stream on which the trainer makes them; None of a copy, which is made
        self._made = None if weights.copied else torch.cuda.current_stream(self._device)
        return weights.tensors()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is computed within is packing; called on the thread that sends, which begins with the first device."""
        with torch.cuda.device(self._device):
            self._stream = self._stream or torch.cuda.Stream(self._device)  # whose memory the next push uses again
            with torch.cuda.stream(self._stream):
                yield

    def takes(self, tensor: torch.Tensor) -> None:
        """Makes sure of a tensor before it is read."""
        if self._made is not None:
            self._stream.wait_stream(self._made)  # for whatever the optimizer and a gathering have queued there
        tensor.record_stream(self._stream)  # its memory is for no other before it has been read

    def finish(self) -> None:
        """Waits until all that was begun is packed, or sent."""
        self._stream.synchronize()
