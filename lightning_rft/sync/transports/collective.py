"""Weights by collective: one broadcast group over rank 0 and every explorer, bucket by bucket."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]

from lightning_rft.errors import ConfigurationError, LinkError, RFTError, TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.sync.transports.memory import ReusedMemory
from lightning_rft.sync.transports.transport import Explorers, Transport, Weights, announce, buckets, nbytes

__all__ = ["CollectiveTransport", "GlooLink"]

_WATCH_S = 0.05
_MEET_S = 0.001
_GO = "go"
_ATTEMPTS = 3
_SETTLE_S = 5.0  # for those that are left to notice that their group is no more
_SETTING = "CollectiveTransport(timeout_s=...)"
_Arriving = tuple[Sequence[TensorInfo], torch.Tensor, Any]  # a bucket, its bytes, and what is to be waited for


class CollectiveTransport(Transport):
    """Broadcasts the weights from the trainer to every explorer.

    Gloo is ours and runs everywhere; NCCL is vLLM's own weight transfer (see
    :mod:`lightning_rft.sync.transports.nccl`) and needs the trainer and every vLLM engine on GPUs of their own. The
    group is made at the first push and made again when the explorers change; its port is chosen by the operating
    system. When a member dies or does not come in time, the push is repeated with the others.

    Args:
        backend: ``"gloo"``, ``"nccl"``, or ``"auto"`` for NCCL where both sides can, else Gloo.
        timeout_s: Deadline of one push, the making of the group included.
        bucket_mib: MiB that travel at a time.

    Raises:
        ConfigurationError: ``backend`` is none of the three.
    """

    one_by_one = True  # a group of two for each: whoever is slow holds up no one

    def __init__(
        self, backend: Literal["auto", "nccl", "gloo"] = "auto", timeout_s: float = 120.0, bucket_mib: int = 64
    ) -> None:
        if backend not in ("auto", "nccl", "gloo"):
            raise ConfigurationError(f"CollectiveTransport(backend={backend!r}): use 'auto', 'nccl' or 'gloo'")
        self.backend = backend
        self.timeout_s = timeout_s
        self.bucket_mib = bucket_mib
        self._senders: dict[tuple[int, ...], tuple[dict[int, int], _Sender]] = {}

    def push(self, weights: Weights, version: int, explorers: Explorers, to: Sequence[int] | None = None) -> None:
        """Broadcasts ``version``; see :meth:`Transport.push`."""
        tensors = [(name, tensor.detach()) for name, tensor in weights]
        manifest = announce(tensors, explorers.dtype)
        todo = set(explorers.members() if to is None else to)
        left = _ATTEMPTS
        while members := {explorer: size for explorer, size in explorers.members().items() if explorer in todo}:
            deadline = time.monotonic() + self.timeout_s
            sender = self._sender(members, tensors, explorers)
            try:
                if not sender.joined:
                    _watched(lambda: sender.join(explorers, members), members, explorers, deadline)  # noqa: B023
                for explorer in members:
                    explorers.load(explorer, manifest, version)
                _watched(lambda: sender.send(tensors, manifest), members, explorers, deadline)  # noqa: B023
                explorers.wait_loaded(version, list(members), deadline - time.monotonic(), _SETTING)
                break
            except LinkError as error:
                absent = sender.absent()
                self.close()  # a group in which one member broke off is of no use to the others
                explorers.end(absent, f"did not join the weight transport in time: raise {_SETTING}, or see its log")
                explorers.settle(list(members), _SETTLE_S)
                if members.keys() <= explorers.members().keys():  # no death explains it
                    left -= 1
                    if not left:
                        raise TransportError(f"a weight push broke off {_ATTEMPTS} times: {error}") from error
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Leaves every group."""
        for _, sender in self._senders.values():
            sender.close()
        self._senders.clear()

    def _sender(self, members: dict[int, int], tensors: Weights, explorers: Explorers) -> _Sender:
        """The group of these explorers; an explorer that was in another one has left that."""
        key = tuple(members)
        known, sender = self._senders.get(key, ({}, None))
        if sender is None or known != members:
            alive = explorers.members().keys()
            for other in [other for other in self._senders if set(other) & set(key) or not set(other) <= alive]:
                self._senders.pop(other)[1].close()
            sender = self._make_sender(tensors, explorers)
            self._senders[key] = dict(members), sender
        return sender

    def _make_sender(self, tensors: Weights, explorers: Explorers) -> _Sender:
        on_gpu = all(tensor.is_cuda for _, tensor in tensors)
        if self.backend == "nccl" and not (on_gpu and explorers.nccl):
            raise ConfigurationError(
                "CollectiveTransport(backend='nccl') needs the trainer and a vLLM engine on GPUs, and a strategy that "
                "waits for pushes (asynchronous ones push from a snapshot in the CPU's memory): use backend='auto'"
            )
        if self.backend == "nccl" or (self.backend == "auto" and on_gpu and explorers.nccl):
            from lightning_rft.sync.transports.nccl import NCCLSender

            return NCCLSender(self.timeout_s)
        return GlooSender(self.timeout_s, self.bucket_mib << 20)


class _Sender:
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


class GlooSender(_Sender):
    """Rank 0 of a Gloo group of our own, apart from any group of the trainer's."""

    def __init__(self, timeout_s: float, bucket_bytes: int) -> None:
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._memory = ReusedMemory(bucket_bytes)
        self._group: ProcessGroupGloo | None = None
        self._store: TCPStore | None = None
        self._closed = False
        self._invited: dict[str, int] = {}  # what an explorer's process writes into the store when it comes

    @property
    def joined(self) -> bool:
        """Whether the group is made."""
        return self._group is not None

    def join(self, explorers: Explorers, members: Mapping[int, int]) -> None:
        """Opens a store on a free port, invites every explorer, and meets them."""
        world = 1 + sum(members.values())
        timeout = timedelta(seconds=self._timeout_s)
        store = self._store = TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timeout, wait_for_workers=False)
        rank = 1
        for explorer, size in members.items():
            link = GlooLink("127.0.0.1", store.port, rank, world, self._timeout_s, self._bucket_bytes)
            self._invited |= {f"here/{member}": explorer for member in range(rank, rank + size)}
            explorers.connect(explorer, link)
            rank += size
        # Making the group cannot be broken off, so it begins when everyone has come; who waits in vain for another
        # member is freed by the end of the store.
        while not store.check(list(self._invited)):
            if self._closed:
                return
            time.sleep(_MEET_S)
        store.set(_GO, "")
        self._group = _gloo(store, 0, world, timeout)

    def absent(self) -> list[int]:
        """Those without whom the group cannot be made."""
        store = self._store
        return [] if store is None else [who for key, who in self._invited.items() if not store.check([key])]

    def send(self, tensors: Weights, manifest: Sequence[TensorInfo]) -> None:
        """Packs each bucket's bytes (Gloo cannot broadcast bfloat16) and broadcasts them."""
        group = self._group
        assert group is not None, "send before join"
        by_name = dict(tensors)
        before: Any = None
        for bucket in buckets(manifest, self._bucket_bytes):
            if self._closed:
                return
            buffer = self._memory.take(sum(map(nbytes, bucket)))
            for info, view in _views(bucket, buffer):
                view.copy_(by_name[info.name])
            if before is not None:
                before.wait()  # it travelled while this one was packed
            before = _broadcast(group, buffer)
        if before is not None:
            before.wait()

    def close(self) -> None:
        """Drops group and store: with the last reference to the group its connections close."""
        self._closed = True
        self._group = None
        self._store = None


@dataclass(frozen=True)
class GlooLink:
    """An invitation to a Gloo group.

    Args:
        host: Where rank 0's store listens.
        port: Its port.
        rank: Rank of the engine's first weight-holding process; the others follow.
        world_size: Members of the group, rank 0 included.
        timeout_s: Deadline of the meeting and of each broadcast.
        bucket_bytes: Bytes that travel at a time.
    """

    host: str
    port: int
    rank: int
    world_size: int
    timeout_s: float
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
        with _link_errors():
            self._store = TCPStore(link.host, link.port, None, is_master=False, timeout=timeout)
            self._store.set(f"here/{link.rank + member}", "")
            self._store.wait([_GO], timeout)
            self._group: ProcessGroupGloo | None = _gloo(self._store, link.rank + member, link.world_size, timeout)

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors of one push; the next bucket travels while the engine loads one.

        Raises:
            LinkError: The group broke off in the middle.
        """
        group = self._group
        if group is None:
            raise TransportError("weights were announced on a link that was closed")
        arriving = self._arriving(group, manifest)
        wanted = {info.same_as for info in manifest}
        kept: dict[str, torch.Tensor] = {}
        for info in manifest:
            tensor = next(arriving) if info.same_as is None else kept[info.same_as]
            if info.name in wanted:
                kept[info.name] = tensor
            yield info.name, tensor

    def _arriving(self, group: ProcessGroupGloo, manifest: Sequence[TensorInfo]) -> Iterator[torch.Tensor]:
        """All but aliases, in order."""
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
    """What torch raises when a member of a group is gone, in our terms."""
    try:
        yield
    except RuntimeError as error:
        raise LinkError(f"the weight transport broke off: {error}") from error


def _gloo(store: Store, rank: int, world_size: int, timeout: timedelta) -> ProcessGroupGloo:
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # by address: a host whose own name does not resolve would not find itself
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, options)


def _broadcast(group: ProcessGroupGloo, buffer: torch.Tensor) -> Any:
    """Begins a broadcast; what it returns is to be waited for."""
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


def _watched(function: Callable[[], None], members: Mapping[int, int], explorers: Explorers, deadline: float) -> None:
    """Runs a blocking collective on a thread, so that the death of a member ends it at once.

    Raises:
        LinkError: A member is gone or the deadline has passed: the group is of no use any more.
        Exception: What ends the run.
    """
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            # These frames hold the group: while they do, it keeps its connections, and whoever waits for the rest of
            # this push would not learn that it broke off.
            traceback.clear_frames(error.__traceback__)
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=run, name="weight-push", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_WATCH_S)
        explorers.raise_failures()
        if gone := members.keys() - explorers.members().keys():
            raise LinkError(f"explorers {sorted(gone)} are gone")
        if time.monotonic() > deadline:
            raise LinkError(f"a weight push passed its deadline: raise {_SETTING}")
    error = outcome[0]
    if isinstance(error, (RuntimeError, OSError)) and not isinstance(error, RFTError):
        raise LinkError(f"a weight push broke off: {error}") from error
    if error is not None:
        raise error
