"""NCCL and CUDA on a machine without either: Gloo carries the bytes, and calls of devices and streams are recorded.

A thread begins with device 0, as in CUDA. Work that is queued on a stream is done when another stream, or the CPU,
waits for it, and not before: bytes that were sent too soon are wrong bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, ProcessGroupGloo  # type: ignore[attr-defined]

__all__ = ["CUDA", "Call", "Communicator", "Stream"]

FIRST = torch.device("cuda:0")


@dataclass(frozen=True)
class Call:
    """What was called, by which thread, on which device and stream."""

    what: str
    device: torch.device
    stream: Stream
    thread: str
    size: int = 0
    other: Any = None


class Stream:
    """A queue of work."""

    def __init__(self, device: Any = None, *, cuda: CUDA | None = None) -> None:
        self.cuda = cuda
        self.work: list[Callable[[], None]] = []

    def wait_stream(self, other: Stream) -> None:
        assert self.cuda is not None
        self.cuda.record("wait", on=self, other=other)
        other.run()

    def synchronize(self) -> None:
        assert self.cuda is not None
        self.cuda.record("synchronize", on=self)
        self.run()

    def run(self) -> None:
        work, self.work = self.work, []
        for each in work:
            each()


@dataclass
class CUDA:
    """The calls of torch.cuda, recorded."""

    calls: list[Call] = field(default_factory=list)
    stores: dict[bytes, HashStore] = field(default_factory=dict)  # by unique id, where the members of a group meet
    groups: list[Communicator] = field(default_factory=list)
    disabled: bool = False
    #: Called with a communicator's rank before it joins, and with rank and number before each broadcast.
    joining: Callable[[int], None] = lambda rank: None
    broadcasting: Callable[[int, int], None] = lambda rank, number: None

    def __post_init__(self) -> None:
        self._here = threading.local()
        self._default = {index: Stream(cuda=self) for index in range(4)}
        self._lock = threading.Lock()

    @classmethod
    def put_in_place(cls, patch: pytest.MonkeyPatch) -> CUDA:
        """In place of torch.cuda's own, and of vLLM's communicator."""
        from vllm.distributed.device_communicators import pynccl_wrapper
        from vllm.distributed.weight_transfer import nccl_common, packed_tensor

        cuda = cls()
        packed_tensor._get_streams.cache_clear()
        patch.setattr(torch.cuda, "device", cuda.device)
        patch.setattr(torch.cuda, "current_stream", cuda.current_stream)
        patch.setattr(torch.cuda, "Stream", lambda device=None: Stream(cuda=cuda))
        patch.setattr(torch.cuda, "stream", cuda.stream)
        patch.setattr(torch.accelerator, "current_device_index", lambda: cuda.current_device.index or 0)
        patch.setattr(torch.Tensor, "record_stream", lambda *args: cuda.record_stream(*args), raising=False)
        patch.setattr(pynccl_wrapper, "NCCLLibrary", lambda: SimpleNamespace(ncclGetUniqueId=cuda.unique_id))
        patch.setattr(nccl_common, "uid_init_process_group", lambda *group: Communicator(cuda, *group))
        return cuda

    @property
    def current_device(self) -> torch.device:
        return getattr(self._here, "device", FIRST)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self._here.device = self.current_device, device
        try:
            yield
        finally:
            self._here.device = before

    def current_stream(self, device: torch.device | None = None) -> Stream:
        index = (self.current_device if device is None else device).index
        return getattr(self._here, "stream", None) or self._default[index or 0]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = getattr(self._here, "stream", None)
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = before

    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        self.record("keep", on=stream, size=tensor.numel())

    def record(self, what: str, on: Stream | None = None, size: int = 0, other: Any = None) -> None:
        thread = threading.current_thread().name
        self.calls.append(Call(what, self.current_device, on or self.current_stream(), thread, size, other))

    def unique_id(self) -> bytes:
        with self._lock:
            unique_id = len(self.stores).to_bytes(128, "little")
            self.stores[unique_id] = HashStore()
        return unique_id


class Communicator:
    """As vLLM's ``PyNcclCommunicator``, as far as it is used."""

    def __init__(self, cuda: CUDA, unique_id: bytes, rank: int, world: int, device: Any) -> None:
        assert len(unique_id) == 128
        cuda.joining(rank)
        self.cuda = cuda
        self.rank = rank
        self.disabled = cuda.disabled
        self.sent = 0
        self.destroyed_by: list[str] = []
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=20)
        cuda.record("join", other=(rank, device))
        cuda.groups.append(self)
        self._group: Any = ProcessGroupGloo(cuda.stores[unique_id], rank, world, options)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self.sent += 1
        self.cuda.broadcasting(self.rank, self.sent)
        self.cuda.record("broadcast", size=tensor.numel(), other=self.rank)
        options = dist.BroadcastOptions()
        options.rootRank = src
        group = self._group
        if group is None:
            raise RuntimeError("NCCL error: communicator was aborted")
        group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        self.destroyed_by.append(threading.current_thread().name)
        self._group = None
