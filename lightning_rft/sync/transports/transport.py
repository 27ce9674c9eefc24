"""What every weight transport is: the trainer's half pushes, a link invites the explorers' half."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from lightning_rft.experience import TensorInfo

__all__ = ["Explorers", "Sender", "Transport", "Weights", "announce", "buckets", "nbytes"]


class Explorers(Protocol):
    """What a transport may ask of the explorers."""

    def members(self) -> dict[int, int]:
        """Explorer index -> number of processes inside it that hold weights."""
        ...

    @property
    def folder(self) -> Path:
        """The run's own folder, which explorers see too."""
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
        """Raises what ends the run, if something does."""
        ...

    def wait_loaded(self, version: int, explorers: Sequence[int], timeout_s: float, setting: str) -> None:
        """Returns when each of ``explorers`` that is alive computes with ``version``.

        One that did not get it within ``timeout_s`` is ended, and another started for it.

        Raises:
            LinkError: The transport broke off for one that is alive.
        """
        ...

    def end(self, explorers: Sequence[int], blame: str) -> None:
        """Ends explorers that are of no use; others are started for them. Returns when they are gone."""
        ...

    def settle(self, explorers: Sequence[int], timeout_s: float) -> None:
        """Returns when none of ``explorers`` is in the middle of a load; one that is stuck in it is ended."""
        ...


Weights = Sequence[tuple[str, torch.Tensor]]


class Transport(ABC):
    """Carries weights from the trainer to the explorers. Starts nothing until the first push."""

    #: What the trainer's half of a push, and an explorer's, are called in the timeline.
    push_label: str = "sync"
    load_label: str = "load"
    #: Whether pushes in the background go to one explorer at a time.
    one_by_one: bool = False
    #: Seconds that one push may take; whoever has not loaded it then is ended.
    timeout_s: float = 120.0

    def prepare(self, weights: Weights, version: int, explorers: Explorers) -> bool:
        """Does what can be done before anyone loads ``version``, such as writing a file; by default nothing.

        A push in the background calls it first, and :meth:`push` later, for one explorer after another.

        Returns:
            Whether there was anything to do.
        """
        return False

    @abstractmethod
    def push(self, weights: Weights, version: int, explorers: Explorers, to: Sequence[int] | None = None) -> None:
        """Brings ``version`` to explorers and returns when each computes with it.

        Args:
            weights: Name and tensor of every entry of the policy's ``state_dict``, aliases included: an engine may
                keep its own copy of a tied weight.
            version: The version that these weights are.
            explorers: How to reach them.
            to: Which of them; left out, all.

        Explorers that die meanwhile are left out, and so are those that do not take it within ``timeout_s``, which are
        ended.

        Raises:
            TransportError: The weights cannot be sent, or an engine did not take every tensor.
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
    """Cuts a manifest into runs of at most ``limit`` bytes (a larger tensor is a run of its own), without aliases.

    Both halves compute it from the same manifest, so nothing about it needs to travel.

    Example:
        >>> specs = [TensorInfo(name, "float32", (4,)) for name in "abc"]
        >>> [[spec.name for spec in bucket] for bucket in buckets(specs, limit=32)]
        [['a', 'b'], ['c']]
    """
    cut: list[list[TensorInfo]] = []
    room = 0
    for spec in manifest:
        if spec.same_as is not None:
            continue
        size = nbytes(spec)
        if size > room or not cut:
            cut.append([])
            room = limit
        cut[-1].append(spec)
        room -= size
    return cut


def announce(weights: Weights, dtype: str) -> list[TensorInfo]:
    """What will arrive: floating-point tensors in the engines' dtype, others in their own.

    Example:
        >>> tied = torch.ones(2, 3)
        >>> for info in announce([("embedding", tied), ("steps", torch.tensor([1])), ("head", tied)], "bfloat16"):
        ...     print(info.name, info.dtype, info.shape, info.same_as)
        embedding bfloat16 (2, 3) None
        steps int64 (1,) None
        head bfloat16 (2, 3) embedding
    """
    manifest = []
    first: dict[Any, str] = {}
    for name, tensor in weights:
        kind = dtype if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
        place: Any = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if not tensor.numel():
            place = name  # an empty tensor is nowhere
        same_as = first.get(place)
        first.setdefault(place, name)
        manifest.append(TensorInfo(name, kind, tuple(tensor.shape), same_as))
    return manifest


class Sender:
    """The trainer's end of a group."""

    @property
    def joined(self) -> bool:
        """Whether all members have met."""
        return False

    def join(self, explorers: Explorers, members: Mapping[int, int]) -> None:
        """Invites the members (explorer -> processes that hold weights) and meets them."""

    def absent(self) -> list[int]:
        """Who was invited and has not come."""
        return []

    def send(self, tensors: Weights, manifest: Sequence[TensorInfo]) -> None:
        """Sends what was announced."""

    def close(self) -> None:
        """Leaves."""
