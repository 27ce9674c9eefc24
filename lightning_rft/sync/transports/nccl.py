"""Weight transport by NCCL, whose other end is vLLM's own weight transfer (``vllm>=0.30``).

Not run yet: it was written without a GPU. It follows what vLLM documents for trainers that hand NCCL's unique id over
themselves: no store is opened, and nothing is unpickled that did not come by our own channels.
"""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from lightning_rft.errors import TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.sync.transports.transport import Explorers, Named, Sender, under_all_names

__all__ = ["NCCLLink", "NCCLSender"]


@dataclass(frozen=True)
class NCCLLink:
    """An invitation to an NCCL group: the keyword arguments of vLLM's ``NCCLWeightTransferInitInfo``."""

    nccl: dict[str, Any]

    def open(self, member: int) -> Any:
        """Refuses: only vLLM can join."""
        raise TransportError("this engine cannot receive by NCCL: set CollectiveTransport(backend='gloo')")


class NCCLSender(Sender):
    """Rank 0 of an NCCL group with vLLM's workers; ``device`` holds the weights."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._group: Any = None

    @property
    @override
    def joined(self) -> bool:
        return self._group is not None

    @override
    def join(self, explorers: Explorers, members: Mapping[int, int]) -> None:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        world = 1 + sum(members.values())
        unique_id = bytes(NCCLLibrary().ncclGetUniqueId())
        rank = 1
        for explorer, size in members.items():
            invitation = {"nccl_unique_id_b64": b64encode(unique_id).decode(), "rank_offset": rank, "world_size": world}
            explorers.connect(explorer, NCCLLink(invitation | {"packed": True}))
            rank += size
        self._group = uid_init_process_group(unique_id, 0, world, self._device)

    @override
    def send(self, tensors: Iterable[Named], manifest: Sequence[TensorInfo]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        with torch.cuda.device(self._device):  # a thread of its own begins with the first device
            cast = self._cast(tensors, manifest)
            packed_nccl_broadcast_producer(cast, self._group, src=0, post_iter_func=lambda item: item[1])

    def _cast(self, tensors: Iterable[Named], manifest: Sequence[TensorInfo]) -> Iterator[Named]:
        """Yields aliases too, since vLLM's receiver knows none; on the stream that vLLM packs on."""
        made = torch.cuda.default_stream(self._device)
        named = under_all_names(manifest, (tensor for _, tensor in tensors))
        for info, (name, tensor) in zip(manifest, named, strict=True):
            packs = torch.cuda.current_stream(self._device)
            packs.wait_stream(made)
            tensor.record_stream(packs)  # its memory is not for the next one before it has been read
            yield name, tensor.to(getattr(torch, info.dtype))

    @override
    def close(self) -> None:
        if self._group is not None:
            # an aborted collective can hold the communicator: never wait for it here
            threading.Thread(target=self._group.destroy, name="nccl-shutdown", daemon=True).start()
            self._group = None
