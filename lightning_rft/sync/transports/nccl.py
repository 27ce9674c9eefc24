"""Weight transport by NCCL, with both halves of vLLM's own weight transfer (``vllm>=0.30``).

Not run yet: it was written without a GPU. It follows vLLM's documented handshake; ours are only the client that carries
it to the explorers, and the source of the tensors.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from lightning_rft.errors import TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.sync.transports.transport import Explorers, Sender, Weights

__all__ = ["NCCLLink", "NCCLSender"]


@dataclass(frozen=True)
class NCCLLink:
    """An invitation to an NCCL group: the keyword arguments of vLLM's ``NCCLWeightTransferInitInfo``."""

    nccl: dict[str, Any]

    def open(self, member: int) -> Any:
        """Refuses: only vLLM can join."""
        raise TransportError("this engine cannot receive by NCCL: set CollectiveTransport(backend='gloo')")


class NCCLSender(Sender):
    """Rank 0 of vLLM's NCCL weight-transfer group."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._engine: Any = None
        self._source: Any = None

    @property
    @override
    def joined(self) -> bool:
        return self._engine is not None

    @override
    def join(self, explorers: Explorers, members: Mapping[int, int]) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = 1 + sum(members.values())
        self._source = _source()
        self._engine = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=port, world_size=world),
            client=_Client(explorers, members),
            source=self._source,
        )

    @override
    def send(self, tensors: Weights, manifest: Sequence[TensorInfo]) -> None:
        self._source.tensors, self._source.manifest = tensors, manifest
        self._engine.send_weights()

    @override
    def close(self) -> None:
        if self._engine is not None:
            # an aborted collective can hold the communicator: never wait for it here
            threading.Thread(target=self._engine.shutdown, name="nccl-shutdown", daemon=True).start()
            self._engine = None


class _Client:
    """vLLM's control plane over our own channels; the transport itself announces loads."""

    def __init__(self, explorers: Explorers, members: Mapping[int, int]) -> None:
        self._explorers = explorers
        self._members = members

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        rank = 1
        for explorer, size in self._members.items():
            self._explorers.connect(explorer, NCCLLink({**init_info, "rank_offset": rank}))
            rank += size

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        pass

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


def _source() -> Any:
    """A vLLM ``WeightSource`` of what the transport is about to send; its base class is there only with vLLM."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        tensors: Weights = ()
        manifest: Sequence[TensorInfo] = ()

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(info.name, getattr(torch, info.dtype), info.shape) for info in self.manifest]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for (name, tensor), info in zip(self.tensors, self.manifest, strict=True):
                yield name, tensor.to(getattr(torch, info.dtype))

    return Source()
