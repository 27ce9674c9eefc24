"""Safetensors files of weights, on a disk or in shared memory, written tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from typing_extensions import override

from lightning_rft.errors import TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.sync.transports.transport import Weights

__all__ = ["InMemory", "OnDisk", "Stored", "data_bytes"]

_FILE = "model.safetensors"
_KINDS = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"},
}
_PIECE = 1 << 20  # elements that are cast at a time, so that they are written while a core's cache still holds them


class Stored(Protocol):
    """A file that explorers can read by its path until it is removed."""

    path: str

    def remove(self) -> None:
        """Removes it; those who read it read on."""


class OnDisk(Stored):
    """A file in a folder, which exists completely or not at all: written beside it, synced, and renamed."""

    def __init__(self, folder: Path, weights: Weights, metadata: Mapping[str, str]) -> None:
        self.path = str(folder / _FILE)
        self._folder = folder
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            descriptor = os.open(unfinished / _FILE, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                _write(descriptor, weights, metadata)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            _sync(unfinished)
            os.rename(unfinished, folder)
            _sync(folder.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    @override
    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class InMemory(Stored):
    """A file without a name (memfd), which is gone with the last process that has it open, however that ends.

    Unlike one in ``/dev/shm``, it is not bounded by the size of a file system, which is 64 MiB in many containers.
    """

    #: Whether this machine has such files.
    supported = hasattr(os, "memfd_create") and Path("/proc/self/fd").exists()

    def __init__(self, weights: Weights, metadata: Mapping[str, str]) -> None:
        self._descriptor: int | None = os.memfd_create(f"{metadata['run']}-{metadata['version']}")
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        try:
            _write(self._descriptor, weights, metadata)
        except BaseException:
            self.remove()
            raise

    @override
    def remove(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def data_bytes(manifest: Sequence[TensorInfo]) -> int:
    """Bytes of all tensors, an alias counted with the tensor that it is."""
    return sum(_size(info) for info in manifest if info.same_as is None)


def _write(descriptor: int, weights: Weights, metadata: Mapping[str, str]) -> None:
    own = [info for info in weights.manifest if info.same_as is None]
    # the largest elements first, so that every tensor lies where it can be viewed in its own dtype
    places, offset = {}, 0
    for info in sorted(own, key=lambda info: -_dtype(info).itemsize):
        places[info.name] = offset
        offset += _size(info)
    header = json.dumps(
        {"__metadata__": metadata}
        | {
            info.name: {
                "dtype": _KINDS[info.dtype],
                "shape": info.shape,
                "data_offsets": [places[info.name], places[info.name] + _size(info)],
            }
            for info in own
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    start = 8 + len(header)
    _write_at(descriptor, 0, len(header).to_bytes(8, "little") + header)
    for info, (name, tensor) in zip(own, weights.tensors(), strict=True):
        if name != info.name:
            raise TransportError(f"{info.name} was announced, but {name} was to be sent")
        position = start + places[name]
        for piece in _pieces(tensor.detach().to("cpu").reshape(-1), _dtype(info)):
            data = piece.view(torch.uint8).numpy()
            _write_at(descriptor, position, data)
            position += data.nbytes


def _pieces(flat: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A tensor in the dtype that is announced, cast bit by bit into one piece of memory if it must be."""
    if flat.dtype == dtype:
        yield flat
        return
    room = torch.empty(min(_PIECE, flat.numel()), dtype=dtype)
    for part in flat.split(_PIECE):
        yield room[: part.numel()].copy_(part)


def _write_at(descriptor: int, position: int, data: Any) -> None:
    left = memoryview(data)
    while left.nbytes:
        written = os.pwrite(descriptor, left, position)
        left, position = left[written:], position + written


def _dtype(info: TensorInfo) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, info.dtype)
    return dtype


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape) * _dtype(info).itemsize


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
