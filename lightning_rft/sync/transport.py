"""What every weight transport is: the trainer's half pushes, a link invites the explorers' half."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lightning_rft.experience import TensorInfo

__all__ = ["Explorers", "Push", "Transport", "buckets", "nbytes"]


class Explorers(Protocol):
    """What a transport may ask of the explorers."""

    def members(self) -> dict[int, int]:
        """Explorer index -> number of processes inside it that hold weights."""
        ...

    @property
    def dtype(self) -> str:
        """Dtype of the engines' weights, such as ``"bfloat16"``."""
        ...

    @property
    def nccl(self) -> bool:
        """Whether every engine can receive by NCCL."""
        ...

    def connect(self, explorer: int, link: Any) -> None:
        """Asks an explorer to join through ``link``; returns at once."""
        ...

    def load(self, explorer: int, manifest: Sequence[TensorInfo], version: int) -> None:
        """Asks an explorer to receive ``version``; returns at once."""
        ...

    def raise_failures(self) -> None:
        """Raises the error of an explorer that failed, if one did."""
        ...

    def wait_loaded(self, version: int, timeout_s: float) -> None:
        """Returns when every explorer computes with ``version``."""
        ...


@dataclass(frozen=True)
class Push:
    """What a push did.

    Args:
        seconds: Wall-clock seconds until every explorer had loaded it.
        changed: Share of (sampled) elements that differ from the push before, in the engines' dtype; 1 at first. Small
            updates vanish in bfloat16: a share near 0 says that explorers see the same policy as before.
    """

    seconds: float
    changed: float


class Transport(ABC):
    """Carries weights from the trainer to the explorers. Starts nothing until the first push."""

    @abstractmethod
    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int, explorers: Explorers) -> Push:
        """Brings ``version`` to every explorer and returns when each computes with it.

        Args:
            weights: Name and tensor of every entry of the policy's ``state_dict``, aliases included: an engine may
                keep its own copy of a tied weight.
            version: The version that these weights are.
            explorers: Those to bring it to.

        Raises:
            TransportError: A member failed or did not take every tensor.
            DeadlineError: It took longer than ``timeout_s``.
        """

    def close(self) -> None:
        """Leaves groups and frees buffers; safe to call twice."""


def nbytes(info: TensorInfo) -> int:
    """Size in bytes, rounded up to 16, so that every tensor of a bucket can be viewed in its own dtype.

    Example:
        >>> nbytes(TensorInfo("bias", "bfloat16", (3,)))
        16
    """
    dtype: torch.dtype = getattr(torch, info.dtype)
    return -(-math.prod(info.shape) * dtype.itemsize // 16) * 16


def buckets(manifest: Sequence[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    """Cuts a manifest into runs of at most ``limit`` bytes (a larger tensor is a run of its own).

    Both halves compute it from the same manifest, so nothing about it needs to travel.

    Example:
        >>> specs = [TensorInfo(name, "float32", (4,)) for name in "abc"]
        >>> [[spec.name for spec in bucket] for bucket in buckets(specs, limit=32)]
        [['a', 'b'], ['c']]
    """
    cut: list[list[TensorInfo]] = []
    room = 0
    for spec in manifest:
        size = nbytes(spec)
        if size > room or not cut:
            cut.append([])
            room = limit
        cut[-1].append(spec)
        room -= size
    return cut
