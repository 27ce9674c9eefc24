"""The explorer's half of weight transfer, inside vLLM's own lifecycle (``vllm>=0.30``).

vLLM calls ``start_weight_update``, ``update_weights`` and ``finish_weight_update`` in every worker; the engine here
fills them with tensors from one of our transports' receivers, or hands over to vLLM's NCCL engine. It goes through the
layerwise reload, because a plain ``load_weights`` fails after start-up (the CPU backend has repacked its weights).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from typing_extensions import override
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from lightning_rft.errors import TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.explorer.engines.engine import WeightLink, WeightReceiver

__all__ = ["BACKEND", "LinkWeightTransferEngine", "register"]

BACKEND = "lightning_rft"


@dataclass
class LinkInitInfo(WeightTransferInitInfo):
    """How this engine joins: a link, and for NCCL the keyword arguments of vLLM's own engine."""

    link: WeightLink | None = None
    nccl: dict[str, Any] | None = None


@dataclass
class ManifestUpdateInfo(WeightTransferUpdateInfo):
    """What is about to arrive, in order."""

    manifest: Sequence[TensorInfo] = field(default_factory=list)


class LinkWeightTransferEngine(WeightTransferEngine[LinkInitInfo, ManifestUpdateInfo]):
    """Loads what a transport's receiver yields, and refuses to finish while a weight is still the old one."""

    init_info_cls = LinkInitInfo
    update_info_cls = ManifestUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiver: WeightReceiver | None = None
        self._nccl: NCCLWeightTransferEngine | None = None

    @override
    def init_transfer_engine(self, init_info: LinkInitInfo) -> None:
        self.shutdown()
        if init_info.nccl is not None:
            self._nccl = NCCLWeightTransferEngine(self.config, self.vllm_config, self.device, self.model)
            self._nccl.init_transfer_engine(NCCLWeightTransferInitInfo(**init_info.nccl))
        elif init_info.link is not None:
            self._receiver = init_info.link.open(self.parallel_config.rank)

    @override
    def start_weight_update(self) -> None:
        if self.device.type == "cpu":
            for layer in self.model.modules():
                # The CPU backend packs experts only where it makes their kernel, so a kernel that is kept would compute
                # with weights in a layout that it does not read. There are no graphs to hold its addresses.
                if getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None:
                    layer.quant_method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    @override
    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own version synchronises an accelerator, which raises where there is none
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @override
    def receive_weights(self, update_info: ManifestUpdateInfo) -> None:
        try:
            self._receive(update_info.manifest)
            missing = list(self._incomplete())
        except BaseException:
            finalize_layerwise_reload(self.model, self.model_config)  # else half a layer would wait for the next push
            raise
        if missing:  # vLLM itself only logs this, and computes on with the old ones
            finalize_layerwise_reload(self.model, self.model_config)
            raise TransportError(
                f"{len(missing)} layers kept old weights after a push: {', '.join(missing[:8])}. Every name of the "
                "policy's state_dict must be sent, aliases of tied weights included"
            )

    def _receive(self, manifest: Sequence[TensorInfo]) -> None:
        if self._nccl is not None:
            self._nccl.receive_weights(
                NCCLWeightTransferUpdateInfo(
                    names=[info.name for info in manifest],
                    dtype_names=[info.dtype for info in manifest],
                    shapes=[list(info.shape) for info in manifest],
                )
            )
        elif self._receiver is not None:
            tied: dict[str, list[tuple[str, torch.Tensor]]] = {
                info.same_as: [] for info in manifest if info.same_as is not None
            }
            try:
                self.model.load_weights(self._untied(self._receiver, manifest, tied))
            except (KeyError, ValueError) as error:
                raise TransportError(f"vLLM's model does not know a tensor that the trainer sent: {error}") from error
            for names in tied.values():
                self._load_tied(names)
        else:
            raise TransportError("weights were announced before the transport was joined")

    @staticmethod
    def _untied(
        receiver: WeightReceiver, manifest: Sequence[TensorInfo], tied: dict[str, list[tuple[str, torch.Tensor]]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields what arrives, and puts weights that have several names aside."""
        for info, (name, tensor) in zip(manifest, receiver.receive(manifest), strict=True):
            names = tied.get(info.same_as or name)
            if names is None:
                yield name, tensor
            else:
                names.append((name, tensor))

    def _load_tied(self, names: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Loads a weight under those of its names that the model knows.

        Whether it has the weight once or twice (a head of its own, on CPUs) is the model's affair; a copy that kept its
        old contents is found afterwards.
        """
        errors = []
        for name, tensor in names:
            try:
                self.model.load_weights([(name, tensor)])
            except (KeyError, ValueError) as error:
                errors.append(error)
        if len(errors) == len(names):
            raise TransportError(f"vLLM's model does not know a tensor that the trainer sent: {errors[0]}")

    @override
    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def _incomplete(self) -> Iterator[str]:
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            # a layer that got all of its weights was processed at once and can load no more
            if not info.can_load() or is_deferred_attention_layer(layer):
                continue
            expected = sum(p.numel() - _padding(layer, p) for p in layer.parameters(recurse=False))
            if info.load_numel < expected:
                yield f"{name} ({type(layer).__name__}, {info.load_numel} of {expected} elements)"

    @override
    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
        if self._nccl is not None:
            self._nccl.shutdown()
            self._nccl = None


def _padding(layer: torch.nn.Module, parameter: torch.nn.Parameter) -> int:
    """Elements of an embedding or head that no checkpoint holds: vLLM pads vocabularies, on the last ranks alone."""
    rows = getattr(layer, "shard_indices", None)
    if rows is None:
        return 0
    padded: int = layer.num_embeddings_per_partition - rows.num_org_elements - rows.num_added_elements
    return padded * parameter.numel() // parameter.shape[0]


def register() -> None:
    """Makes the engine known to vLLM; the entry point ``vllm.general_plugins`` calls it in tensor-parallel workers."""
    if BACKEND not in WeightTransferEngineFactory._registry:  # registering twice raises, and there is no public query
        WeightTransferEngineFactory.register_engine(BACKEND, LinkWeightTransferEngine)
