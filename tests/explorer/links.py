"""Weight links of tests, in a module that an engine's own processes can import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_rft.experience import TensorInfo


class Link:
    """Weights that are already in this process, or travel to an engine's own processes with the link."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def open(self, member: int) -> Link:
        return self

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, Any]]:
        for info in manifest:
            yield info.name, self.tensors[info.name]

    def close(self) -> None:
        pass
