"""Weight transport by Gloo: a broadcast group of our own over rank 0 and the explorers, on any hardware."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]
from typing_extensions import override

from lightning_rft.errors import TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.network import address_towards
from lightning_rft.sync.transports.meeting import Meeting, MeetingPlace, link_errors
from lightning_rft.sync.transports.memory import ReusedMemory
from lightning_rft.sync.transports.transport import (
    Explorers,
    Named,
    Sender,
    Weights,
    buckets,
    nbytes,
    under_all_names,
)

__all__ = ["GlooLink", "GlooReceiver", "GlooSender"]

_Arriving = tuple[Sequence[TensorInfo], torch.Tensor, Any]  # a bucket, its bytes, and the broadcast to wait for


class GlooSender(Sender):
    """Rank 0 of a Gloo group of our own, apart from any group of the trainer's."""

    def __init__(self, timeout_s: float, bucket_bytes: int) -> None:
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._memory = ReusedMemory(bucket_bytes)
        self._group: ProcessGroupGloo | None = None
        self._meeting: Meeting | None = None
        self._closed = False

    @property
    @override
    def joined(self) -> bool:
        return self._group is not None

    @override
    def join(self, explorers: Explorers, members: Mapping[int, int]) -> None:
        meeting = self._meeting = Meeting(explorers.address, members, self._timeout_s)
        meeting.invite(explorers, partial(GlooLink, bucket_bytes=self._bucket_bytes))
        if not self._closed and meeting.gather():
            group = _gloo(meeting.place, 0)
            meeting.wait_connected()
            meeting.close()
            self._group = group

    @override
    def absent(self) -> list[int]:
        return [] if self._meeting is None else self._meeting.absent()

    @override
    def begin(self, weights: Weights) -> Iterator[Named]:
        if weights.device.type == "cpu":
            return weights.tensors()
        # copied on the stream that makes them: the thread that sends would not wait for it
        return ((name, tensor.to("cpu")) for name, tensor in weights.tensors())

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
        if self._meeting is not None:
            self._meeting.close()


@dataclass(frozen=True)
class GlooLink(MeetingPlace):
    """An invitation to a Gloo group."""

    bucket_bytes: int

    def open(self, member: int) -> GlooReceiver:
        """Joins the group."""
        return GlooReceiver(self, member)


class GlooReceiver:
    """An explorer's end of the group."""

    def __init__(self, link: GlooLink, member: int) -> None:
        self._bucket_bytes = link.bucket_bytes
        self._memory = ReusedMemory(link.bucket_bytes)
        tell_connected = link.come(member)
        with link_errors():
            self._group: ProcessGroupGloo | None = _gloo(link, link.rank + member)
            tell_connected()

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
            with link_errors():
                work.wait()
            arriving = next(broadcasts, None)
            for _, view in _views(bucket, buffer):
                yield view

    def _begin(self, group: ProcessGroupGloo, bucket: Sequence[TensorInfo]) -> _Arriving:
        buffer = self._memory.take(sum(map(nbytes, bucket)))
        with link_errors():
            return bucket, buffer, _broadcast(group, buffer)

    def close(self) -> None:
        """Leaves the group."""
        self._group = None


def _gloo(place: MeetingPlace, rank: int) -> ProcessGroupGloo:
    timeout = timedelta(seconds=place.timeout_s)
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # the interface that leads to rank 0; a host's own name may stand for another one, or for none
    options._devices = [ProcessGroupGloo.create_device(hostname=address_towards(place.host))]
    options._timeout = timeout
    return ProcessGroupGloo(PrefixStore("weights", place.store()), rank, place.world_size, options)


def _broadcast(group: ProcessGroupGloo, buffer: torch.Tensor) -> Any:
    """Begins a broadcast from rank 0, and returns the work to wait for."""
    return group.broadcast([buffer], dist.BroadcastOptions())  # type: ignore[attr-defined]


def _views(bucket: Sequence[TensorInfo], buffer: torch.Tensor) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
    offset = 0
    for info in bucket:
        size = nbytes(info)
        dtype: torch.dtype = getattr(torch, info.dtype)
        count = torch.Size(info.shape).numel()
        yield info, buffer[offset : offset + size].view(dtype)[:count].view(info.shape)
        offset += size
