"""Base class of weight transports: the trainer's half pushes, and a link invites the explorers' half."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lightning_rft.experience import TensorInfo

__all__ = ["Explorers", "Named", "Sender", "Transport", "Weights", "announce", "buckets", "nbytes", "under_all_names"]

Named = tuple[str, torch.Tensor]


class Explorers(Protocol):
    """What a transport may ask of the explorers, whose processes it does not know."""

    def members(self) -> dict[int, int]:
        """Explorer index -> number of its processes that hold weights."""

    folder: Path  #: The run's own, which explorers on this machine see too.

    @property
    def address(self) -> str:
        """Host name or address at which explorers reach the trainer."""

    @property
    def dtype(self) -> str:
        """Dtype of the engines' weights, such as ``"bfloat16"``."""

    @property
    def nccl(self) -> bool:
        """Whether every engine can receive by NCCL."""

    @property
    def ipc(self) -> bool:
        """Whether every engine is on GPUs of the trainer's, and can read what that puts there."""

    def connect(self, explorer: int, link: Any) -> None:
        """Asks an explorer to join through ``link``; returns at once."""

    def load(self, explorer: int, manifest: Sequence[TensorInfo], version: int) -> None:
        """Asks an explorer to receive ``version``; returns at once."""

    def raise_failures(self) -> None:
        """Raises the error that ends the run, if there is one."""

    def wait_loaded(self, version: int, explorers: Sequence[int], timeout_s: float) -> list[int]:
        """Waits until each live one of ``explorers`` computes with ``version``; returns those that do not in time.

        Raises :class:`LinkError` if the transport broke off for a live one.
        """

    def end(self, explorers: Sequence[int], blame: str) -> None:
        """Ends explorers that cannot be used, and returns when they are gone; others are started for them."""

    def settle(self, explorers: Sequence[int], timeout_s: float) -> list[int]:
        """Waits until none of ``explorers`` is loading; returns those that still are after ``timeout_s``."""


@dataclass(frozen=True)
class Weights:
    """One version of the weights, of which no more need exist at a time than what is being sent.

    ``tensors`` begins to yield every announced tensor but aliases, in order; asked again, it begins anew. To make them
    may take all of the trainer's ranks: they are asked for on the thread that pushes, and cast by the one who sends.
    """

    manifest: Sequence[TensorInfo]
    device: torch.device  #: Where they are made.
    tensors: Callable[[], Iterator[Named]]
    copied: bool = False  #: Whether they are a complete copy, which training does not change.

    @classmethod
    def of(cls, named: Sequence[Named], dtype: str) -> Weights:
        """Weights that all exist, to be sent in ``dtype``."""
        manifest = announce(named, dtype)
        names = {info.name for info in manifest if info.same_as is None}
        device = named[0][1].device if named else torch.device("cpu")
        return cls(manifest, device, lambda: ((name, tensor.detach()) for name, tensor in named if name in names))

    def snapshot(self, *, on_cpu: bool = True) -> Weights:
        """Copies them, in the dtypes that are announced, to the CPU's memory, else within that of their GPU.

        Example:
            >>> tied = torch.ones(2)
            >>> copies = Weights.of([("embedding", tied), ("head", tied)], "bfloat16").snapshot()
            >>> tied += 1
            >>> list(copies.tensors())
            [('embedding', tensor([1., 1.], dtype=torch.bfloat16))]
        """
        dtypes = {info.name: getattr(torch, info.dtype) for info in self.manifest}
        if on_cpu:
            copies = [(name, tensor.to("cpu", dtypes[name], copy=True)) for name, tensor in self.tensors()]
            return Weights(self.manifest, torch.device("cpu"), lambda: iter(copies), copied=True)
        copies = [(name, tensor.to(dtypes[name], copy=True)) for name, tensor in self.tensors()]
        # who sends them does so on a stream of its own, and would else have to wait for what training queues on this
        torch.cuda.current_stream(self.device).synchronize()
        return Weights(self.manifest, self.device, lambda: iter(copies), copied=True)


class Transport(ABC):
    """Carries weights from the trainer to the explorers; starts nothing until the first push."""

    #: Names of the trainer's and an explorer's half of a push in the timeline.
    push_label: str = "sync"
    load_label: str = "load"
    #: Whether pushes in the background go to one explorer at a time.
    one_by_one: bool = False
    #: Whether training waits for pushes under asynchronous strategies, too.
    blocking: bool = False
    #: Seconds that one push may take.
    timeout_s: float = 120.0

    def check(self, *, nccl: bool, apart: str) -> None:
        """Raises :class:`ConfigurationError` if it needs NCCL and there can be none (``nccl``), or shared GPUs.

        ``apart`` is why explorers are not on the trainer's GPUs; empty if they are.
        """

    def snapshot(self, weights: Weights, explorers: Explorers) -> Weights:
        """A copy of the weights for a push in the background."""
        return weights.snapshot()

    def prepare(self, weights: Weights, version: int, explorers: Explorers) -> bool:
        """Does what can be done before anyone loads ``version``, such as writing a file; whether there was anything.

        A background push calls it first, and :meth:`push` later, for those explorers that load together.
        """
        return False

    @abstractmethod
    def push(self, weights: Weights, version: int, explorers: Explorers, to: Sequence[int] | None = None) -> None:
        """Brings ``version`` to explorers (``to``, or all) and returns when each computes with it.

        ``weights`` announce every entry of the policy's ``state_dict``, aliases included, since an engine may keep its
        own copy of a tied weight. Explorers that die meanwhile are left out; those that hang are ended after
        ``timeout_s``. Raises :class:`TransportError` if the weights cannot be sent, or an engine did not take every
        tensor.
        """

    def end_late(self, late: Sequence[int], what: str, explorers: Explorers) -> None:
        """Ends those of the explorers that should have done ``what`` by now."""
        explorers.end(late, f"did not {what} in time: raise {type(self).__name__}(timeout_s=...), or see its log")

    def close(self) -> None:
        """Leaves groups and frees buffers; safe to call twice."""


def nbytes(info: TensorInfo) -> int:
    """Size in bytes, rounded up to 16, so that every tensor of a bucket can be viewed in its own dtype."""
    dtype: torch.dtype = getattr(torch, info.dtype)
    return -(-math.prod(info.shape) * dtype.itemsize // 16) * 16


def buckets(manifest: Sequence[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    """Cuts a manifest, without its aliases, into runs of at most ``limit`` bytes; a larger tensor is a run of its own.

    Both halves compute it from the same manifest, so the cuts need not travel.

    Example:
        >>> manifest = [TensorInfo(name, "float32", (4,)) for name in "abc"]
        >>> [[info.name for info in bucket] for bucket in buckets(manifest, limit=32)]
        [['a', 'b'], ['c']]
    """
    cut: list[list[TensorInfo]] = []
    room = 0
    for info in manifest:
        if info.same_as is not None:
            continue
        size = nbytes(info)
        if size > room or not cut:
            cut.append([])
            room = limit
        cut[-1].append(info)
        room -= size
    return cut


def announce(weights: Iterable[Named], dtype: str) -> list[TensorInfo]:
    """The manifest of what will arrive: floating-point tensors in the engines' dtype, others in their own.

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
            place = name  # an empty tensor has no address
        same_as = first.get(place)
        first.setdefault(place, name)
        manifest.append(TensorInfo(name, kind, tuple(tensor.shape), same_as))
    return manifest


def under_all_names(manifest: Sequence[TensorInfo], tensors: Iterator[torch.Tensor]) -> Iterator[Named]:
    """Yields every announced tensor by name, aliases too, of which the other name's is kept until then."""
    wanted = {info.same_as for info in manifest}
    kept: dict[str, torch.Tensor] = {}
    for info in manifest:
        tensor = next(tensors) if info.same_as is None else kept[info.same_as]
        if info.name in wanted:
            kept[info.name] = tensor
        yield info.name, tensor


class Sender:
    """The trainer's end of a group."""

    @property
    def joined(self) -> bool:
        """Whether all members have met."""
        return False

    def join(self, explorers: Explorers, members: Mapping[int, int]) -> None:
        """Invites the members (explorer -> processes that hold weights) and meets them."""

    def absent(self) -> list[int]:
        """Explorers that were invited and have not come."""
        return []

    def begin(self, weights: Weights) -> Iterator[Named]:
        """Yields what :meth:`send` takes; called, and iterated, on the thread that makes the tensors."""
        return weights.tensors()

    def send(self, tensors: Iterable[Named], manifest: Sequence[TensorInfo]) -> None:
        """Sends the announced tensors; ``tensors`` are all but aliases, in order. It has a thread of its own."""

    def close(self) -> None:
        """Leaves the group."""
