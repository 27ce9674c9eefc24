"""Weight transport by Gloo: a broadcast group of our own over rank 0 and the explorers, on any hardware."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]
from typing_extensions import override

from lightning_rft.errors import LinkError, TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.sync.transports.memory import ReusedMemory
from lightning_rft.sync.transports.transport import Explorers, Named, Sender, buckets, nbytes, under_all_names

__all__ = ["GlooLink", "GlooReceiver", "GlooSender"]

_HOST = "127.0.0.1"  # explorers run on this machine
_MEET_S = 0.001
_GO = "go"

_Arriving = tuple[Sequence[TensorInfo], torch.Tensor, Any]  # a bucket, its bytes, and the broadcast to wait for


class GlooSender(Sender):
    """Rank 0 of a Gloo group of our own, apart from any group of the trainer's."""

    def __init__(self, timeout_s: float, bucket_bytes: int) -> None:
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._memory = ReusedMemory(bucket_bytes)
        self._group: ProcessGroupGloo | None = None
        self._store: TCPStore | None = None
        self._closed = False
        self._invited: dict[str, int] = {}  # _here of an explorer's process -> explorer

    @property
    @override
    def joined(self) -> bool:
        return self._group is not None

    @override
    def join(self, explorers: Explorers, members: Mapping[int, int]) -> None:
        world = 1 + sum(members.values())
        timeout = timedelta(seconds=self._timeout_s)
        with socket.create_server((_HOST, 0), backlog=world) as server:  # torch's own would listen on all interfaces
            port = server.getsockname()[1]
            store = self._store = TCPStore(
                _HOST, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=server.detach()
            )
        rank = 1
        for explorer, size in members.items():
            link = GlooLink(_HOST, port, rank, world, self._timeout_s, self._bucket_bytes)
            self._invited |= {_here(member): explorer for member in range(rank, rank + size)}
            explorers.connect(explorer, link)
            rank += size
        # Making the group cannot be broken off, so it begins when everyone has come; the end of the store frees a
        # member that waits in vain for another.
        while not store.check(list(self._invited)):
            if self._closed:
                return
            time.sleep(_MEET_S)
        store.set(_GO, "")
        group = _gloo(_HOST, port, 0, world, timeout)
        store.wait([_met(member) for member in range(1, world)])
        # Anyone on this machine could write into the store, and the group needs it no more.
        self._group, self._store = group, None

    @override
    def absent(self) -> list[int]:
        store = self._store
        return [] if store is None else [who for key, who in self._invited.items() if not store.check([key])]

    @override
    def send(self, tensors: Iterable[Named], manifest: Sequence[TensorInfo]) -> None:
        # buckets of bytes, since Gloo cannot broadcast bfloat16
        group = self._group
        assert group is not None, "send before join"
        coming = iter(tensors)
        before: Any = None
        for bucket in buckets(manifest, self._bucket_bytes):
            if self._closed:
                return
            buffer = self._memory.take(sum(map(nbytes, bucket)))
            for info, view in _views(bucket, buffer):
                name, tensor = next(coming, ("nothing", view))
                if name != info.name:
                    raise TransportError(f"{info.name} was announced, but {name} was to be sent")
                view.copy_(tensor)
            if before is not None:
                before.wait()  # it travelled while this one was packed
            before = _broadcast(group, buffer)
        if before is not None:
            before.wait()

    @override
    def close(self) -> None:
        self._closed = True
        self._group = None  # with the last reference its connections close
        self._store = None


@dataclass(frozen=True)
class GlooLink:
    """An invitation to a Gloo group, whose store listens at ``host`` and ``port`` of rank 0."""

    host: str
    port: int
    rank: int  #: Of the engine's first weight-holding process; the others follow.
    world_size: int
    timeout_s: float  #: Of the meeting and of each broadcast.
    bucket_bytes: int

    def open(self, member: int) -> GlooReceiver:
        """Joins the group."""
        return GlooReceiver(self, member)


class GlooReceiver:
    """An explorer's end of the group."""

    def __init__(self, link: GlooLink, member: int) -> None:
        timeout = timedelta(seconds=link.timeout_s)
        self._bucket_bytes = link.bucket_bytes
        self._memory = ReusedMemory(link.bucket_bytes)
        rank = link.rank + member
        with _link_errors():
            store = TCPStore(link.host, link.port, timeout=timeout)
            store.set(_here(rank), "")
            store.wait([_GO], timeout)
            self._group: ProcessGroupGloo | None = _gloo(link.host, link.port, rank, link.world_size, timeout)
            store.set(_met(rank), "")

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors of one push; the next bucket travels while the engine loads one."""
        group = self._group
        if group is None:
            raise TransportError("weights were announced on a link that was closed")
        yield from under_all_names(manifest, self._arriving(group, manifest))

    def _arriving(self, group: ProcessGroupGloo, manifest: Sequence[TensorInfo]) -> Iterator[torch.Tensor]:
        """Yields all tensors but aliases, in order."""
        broadcasts = (self._begin(group, bucket) for bucket in buckets(manifest, self._bucket_bytes))
        arriving = next(broadcasts, None)
        while arriving is not None:
            bucket, buffer, work = arriving
            with _link_errors():
                work.wait()
            arriving = next(broadcasts, None)
            for _, view in _views(bucket, buffer):
                yield view

    def _begin(self, group: ProcessGroupGloo, bucket: Sequence[TensorInfo]) -> _Arriving:
        buffer = self._memory.take(sum(map(nbytes, bucket)))
        with _link_errors():
            return bucket, buffer, _broadcast(group, buffer)

    def close(self) -> None:
        """Leaves the group."""
        self._group = None


@contextmanager
def _link_errors() -> Iterator[None]:
    """Turns what torch raises when a member of a group is gone into a :class:`LinkError`."""
    try:
        yield
    except RuntimeError as error:
        raise LinkError(f"the weight transport broke off: {error}") from error


def _here(rank: int) -> str:
    """Key that a process sets in the store when it comes."""
    return f"here/{rank}"


def _met(rank: int) -> str:
    """Key that a process sets in the store when it is connected to all others."""
    return f"met/{rank}"


def _gloo(host: str, port: int, rank: int, world_size: int, timeout: timedelta) -> ProcessGroupGloo:
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # by address: a host whose own name does not resolve would not find itself
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    store = PrefixStore("weights", TCPStore(host, port, timeout=timeout))
    return ProcessGroupGloo(store, rank, world_size, options)


def _broadcast(group: ProcessGroupGloo, buffer: torch.Tensor) -> Any:
    """Begins a broadcast, and returns the work to wait for."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return group.broadcast([buffer], options)  # type: ignore[attr-defined]


def _views(bucket: Sequence[TensorInfo], buffer: torch.Tensor) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
    offset = 0
    for info in bucket:
        size = nbytes(info)
        dtype: torch.dtype = getattr(torch, info.dtype)
        count = torch.Size(info.shape).numel()
        yield info, buffer[offset : offset + size].view(dtype)[:count].view(info.shape)
        offset += size
