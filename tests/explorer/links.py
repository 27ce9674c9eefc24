"""The weight link of tests, in a module that an engine's own processes can import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_rft.experience import TensorInfo


class MemoryLink:
    """Weights that are in this process, or travel to an engine's own processes with the link.

    ``push`` says what the next ``receive`` will yield.
    """

    def __init__(self, tensors: Mapping[str, Any] | None = None) -> None:
        self.tensors = dict(tensors or {})
        self.opened: list[int] = []
        self.closed = 0

    def push(self, tensors: Mapping[str, Any]) -> list[TensorInfo]:
        self.tensors = dict(tensors)
        return [
            TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]

    def open(self, member: int) -> MemoryLink:
        self.opened.append(member)
        return self

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, Any]]:
        for info in manifest:
            if info.name in self.tensors:
                yield info.name, self.tensors[info.name]

    def close(self) -> None:
        self.closed += 1
