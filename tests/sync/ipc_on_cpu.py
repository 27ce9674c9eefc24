"""CUDA IPC on a machine without a GPU: files that two processes map are its memory, and all calls are recorded.

Memory is dropped, opened, counted and freed as torch does with that of a GPU: what another process still has open waits
to be collected. The record is one file of all processes, in which what happened first comes first.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_rft.sync.transports.line import Line
from tests.sync.cuda_on_cpu import CUDA, Stream

__all__ = ["IPC", "REFUSES", "Noted", "noted"]

_RECORD = "record"
_EMPTY, _SAY = torch.empty, Line.say
#: A file whose existence has no process open memory.
REFUSES = "no-ipc"


def name(gpu: int) -> str:
    """As UUIDs are printed."""
    return f"{gpu:08d}-0000-0000-0000-000000000000"


@dataclass(frozen=True)
class Noted:
    """A call, by which process and thread, and what the thread's current device was."""

    who: str
    thread: str
    device: str
    what: str
    other: Any = None


class IPC(CUDA):
    """GPUs, of which this process sees ``visible`` ones; ``who`` it is, and where memory and record are."""

    def __init__(self, who: str, folder: Path, visible: list[int]) -> None:
        super().__init__()
        self.who = who
        self.folder = folder
        self.visible = visible
        #: Called with what happens, and how often it has.
        self.happens: Callable[[str, int], None] = lambda what, number: None
        self._times: dict[str, int] = {}
        self._files: dict[int, tuple[str, torch.device]] = {}  # by address, tensors that this process has allocated
        self._limbo: list[str] = []
        self._handles = 0

    @classmethod
    def put_in_place(  # type: ignore[override]
        cls, patch: pytest.MonkeyPatch, who: str, folder: Path, visible: list[int]
    ) -> IPC:
        """In place of torch's own."""
        cuda = cls(who, folder, visible)
        for what in ("device", "current_stream", "stream"):
            patch.setattr(torch.cuda, what, getattr(cuda, what))
        patch.setattr(torch.cuda, "current_device", lambda: cuda.current_device.index or 0)
        patch.setattr(torch.cuda, "device_count", lambda: len(visible))
        patch.setattr(torch.cuda, "get_device_properties", lambda at: SimpleNamespace(uuid=name(visible[at])))
        patch.setattr(torch.cuda, "ipc_collect", cuda.collect)
        patch.setattr(torch.cuda, "Stream", lambda device=None: Stream(cuda=cuda))
        patch.setattr(torch.Tensor, "record_stream", lambda *args: cuda.record_stream(*args), raising=False)
        patch.setattr(torch, "empty", cuda.empty)
        storage = torch.UntypedStorage
        patch.setattr(storage, "_share_cuda_", lambda shared: cuda.share(shared), raising=False)
        patch.setattr(storage, "_new_shared_cuda", cuda.open, raising=False)
        patch.setattr(storage, "_release_ipc_counter_cuda", cuda.take_back, raising=False)
        patch.setattr(Line, "say", lambda line, word: cuda.say(line, word))
        return cuda

    def record(self, what: str, on: Stream | None = None, size: int = 0, other: Any = None) -> None:
        super().record(what, on, size, other)
        entry = self.who, threading.current_thread().name, str(self.current_device), what, size or other
        with open(self.folder / _RECORD, "ab", buffering=0) as record:
            record.write(json.dumps(entry, default=str).encode() + b"\n")
        self._times[what] = self._times.get(what, 0) + 1
        self.happens(what, self._times[what])

    def say(self, line: Line, word: bytes) -> None:
        self.record("say", other=word.decode() if word.isalpha() else "handle")
        _SAY(line, word)

    # The trainer's memory

    def empty(self, *size: Any, **settings: Any) -> torch.Tensor:
        device = settings.get("device")
        if device is None or torch.device(device).type != "cuda":
            return _EMPTY(*size, **settings)
        device = torch.device(device)
        path = self.folder / f"gpu{self.visible[device.index]}-{os.getpid()}-{len(self._files)}"
        path.write_bytes(b"\xee" * size[0])
        memory = _mapped(path, size[0])
        weakref.finalize(memory, self._dropped, path.name)
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self._files[tensor.data_ptr()] = path.name, device
        self.record("allocate", size=size[0])
        return tensor

    def share(self, storage: Any) -> tuple[Any, ...]:
        file, device = self._files[storage.data_ptr()]
        self._handles += 1
        (self.folder / f"{file}.{self._handles}").write_text("1")
        self.record("share", other=self.visible[device.index])
        return device.index, file.encode(), storage.nbytes(), 0, file.encode(), self._handles, b"event", True

    def take_back(self, counter: bytes, number: int) -> None:
        self.record("take back")
        self._count_down(counter.decode(), number)

    def _dropped(self, file: str) -> None:
        self._limbo.append(file)
        self.record("drop")
        self._free()

    def collect(self) -> None:
        self.record("collect")
        self._free()

    def _free(self) -> None:
        for file in list(self._limbo):
            if all(int(counter.read_text()) <= 0 for counter in self.folder.glob(f"{file}.*")):
                self._limbo.remove(file)
                (self.folder / file).unlink()
                self.record("free")

    # An explorer's

    def open(self, device: int, file: bytes, size: int, *rest: Any) -> Any:
        offset, counter, number, _, _ = rest
        if (self.folder / REFUSES).exists():
            raise RuntimeError("CUDA error: operation not supported")
        path = self.folder / file.decode()
        gpu = self.visible[device]
        assert path.name.startswith(f"gpu{gpu}-"), f"{path.name} cannot be opened as memory of GPU {gpu}"
        memory = _mapped(path, size)
        weakref.finalize(memory, self._closed, counter.decode(), number)
        self.record("open", other=gpu)
        return torch.frombuffer(memory, dtype=torch.uint8, offset=offset).untyped_storage()

    def _closed(self, counter: str, number: int) -> None:
        self.record("close")
        self._count_down(counter, number)

    def _count_down(self, counter: str, number: int) -> None:
        path = self.folder / f"{counter}.{number}"
        path.write_text(str(int(path.read_text()) - 1))


def _mapped(path: Path, size: int) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), size)


def noted(folder: Path) -> list[Noted]:
    """What was recorded, by all processes."""
    lines = (folder / _RECORD).read_text().splitlines() if (folder / _RECORD).exists() else []
    return [Noted(*json.loads(line)) for line in lines]
