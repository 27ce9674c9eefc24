"""Weight transport by NCCL, whose other end is vLLM's own weight transfer (``vllm>=0.30``).

Not run on a GPU yet. All that needs one goes through two seams: vLLM's communicator (``uid_init_process_group``), and
the device and stream calls of ``torch.cuda``. It follows what vLLM documents for trainers that hand NCCL's unique id
over themselves: nothing is unpickled that did not come by our own channels.
"""

from __future__ import annotations

import math
import threading
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from typing_extensions import override

from lightning_rft.errors import TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.sync.transports.meeting import Meeting, MeetingPlace
from lightning_rft.sync.transports.packing import Packing
from lightning_rft.sync.transports.transport import Explorers, Named, Sender, Weights

__all__ = ["NCCLLink", "NCCLSender"]

# vLLM receives several buckets on a stream each, but loads a layer whose tensors came in two of them on one: it could
# read what has not arrived.
_STREAMS = 1


@dataclass(frozen=True)
class NCCLLink(MeetingPlace):
    """An invitation to an NCCL group of vLLM's."""

    unique_id: bytes = field(repr=False)
    bucket_bytes: int

    @property
    def init_info(self) -> dict[str, Any]:
        """The keyword arguments of vLLM's ``NCCLWeightTransferInitInfo``."""
        return {
            "nccl_unique_id_b64": b64encode(self.unique_id).decode(),
            "rank_offset": self.rank,
            "world_size": self.world_size,
            "packed": True,
            "packed_buffer_size_bytes": self.bucket_bytes,
            "packed_num_buffers": _STREAMS,
        }

    def open(self, member: int) -> Any:
        """Refuses: only vLLM can join."""
        raise TransportError("this engine cannot receive by NCCL: set CollectiveTransport(backend='gloo')")


class NCCLSender(Sender):
    """Rank 0 of an NCCL group with vLLM's workers; ``device`` holds the weights."""

    def __init__(self, device: torch.device, timeout_s: float, bucket_bytes: int) -> None:
        self._device = device
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._meeting: Meeting | None = None
        self._group: Any = None
        self._connecting = False
        self._closed = False
        self._packing = Packing(device)

    @property
    @override
    def joined(self) -> bool:
        return self._group is not None

    @override
    def join(self, explorers: Explorers, members: Mapping[int, int]) -> None:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        unique_id = bytes(NCCLLibrary().ncclGetUniqueId())
        meeting = self._meeting = Meeting(explorers.address, members, self._timeout_s)
        meeting.invite(explorers, partial(NCCLLink, unique_id=unique_id, bucket_bytes=self._bucket_bytes))
        if self._closed or not meeting.gather():
            return
        self._connecting = True
        try:
            with torch.cuda.device(self._device):  # a thread begins with the first device
                group = uid_init_process_group(unique_id, 0, meeting.world_size, self._device)
        finally:
            self._connecting = False
        if group.disabled:
            raise TransportError("NCCL would carry nothing: unset VLLM_DISABLE_PYNCCL")
        meeting.close()
        self._group = group
        if self._closed:  # meanwhile
            self.close()  # type: ignore[unreachable]

    @override
    def absent(self) -> list[int]:
        if self._meeting is None:
            return []
        return list(self._meeting.members) if self._connecting else self._meeting.absent()

    @override
    def begin(self, weights: Weights) -> Iterator[Named]:
        return self._packing.begin(weights)

    @override
    def send(self, tensors: Iterable[Named], manifest: Sequence[TensorInfo]) -> None:
        coming = iter(tensors)
        with self._packing.entered():
            for bucket in _buckets(manifest, self._bucket_bytes):
                self._group.broadcast(self._packed(bucket, coming), src=0)
                self._packing.finish()  # no more tensors than of one bucket are kept for it

    def _packed(self, bucket: Sequence[TensorInfo], coming: Iterator[Named]) -> torch.Tensor:
        """The bytes of a bucket, tensors of which are made on another stream, and released when they are copied."""
        packed = torch.empty(0)
        offset = 0
        for info in bucket:
            name, tensor = next(coming, ("nothing", packed))
            if name != info.name:
                raise TransportError(f"{info.name} was announced, but {name} was to be sent")
            if not offset:
                packed = tensor.new_empty(sum(map(_size, bucket)), dtype=torch.uint8)
            dtype: torch.dtype = getattr(torch, info.dtype)
            if offset % dtype.itemsize:
                raise TransportError(
                    f"{name} ({info.dtype}) follows tensors of smaller elements, so that vLLM could not read it: set "
                    "CollectiveTransport(backend='gloo')"
                )
            self._packing.takes(tensor)
            packed[offset : offset + _size(info)].view(dtype).view(info.shape).copy_(tensor)
            offset += _size(info)
        return packed

    @override
    def close(self) -> None:
        self._closed = True
        if self._meeting is not None:
            self._meeting.close()
        group, self._group = self._group, None
        if group is not None:
            # an aborted collective can hold the communicator: never wait for it here
            threading.Thread(target=group.destroy, name="nccl-shutdown", daemon=True).start()


def _buckets(manifest: Sequence[TensorInfo], limit: int) -> Iterator[list[TensorInfo]]:
    """Cuts a manifest, without its aliases, as vLLM's receiver does: after the tensor that goes beyond ``limit`` bytes.

    Example:
        >>> manifest = [TensorInfo(name, "float32", (4,)) for name in "abc"]
        >>> [[info.name for info in bucket] for bucket in _buckets(manifest, limit=16)]
        [['a', 'b'], ['c']]
    """
    bucket: list[TensorInfo] = []
    for info in manifest:
        if info.same_as is None:
            bucket.append(info)
            if sum(map(_size, bucket)) > limit:
                yield bucket
                bucket = []
    if bucket:
        yield bucket


def _size(info: TensorInfo) -> int:
    """In bytes."""
    dtype: torch.dtype = getattr(torch, info.dtype)
    return math.prod(info.shape) * dtype.itemsize
