"""The explorer's half of weight transfer, inside vLLM's own lifecycle (``vllm>=0.30``).

vLLM calls ``start_weight_update``, ``update_weights`` and ``finish_weight_update`` in every worker; the engine here
fills them with tensors from one of our transports' receivers, or hands over to vLLM's NCCL engine. It goes through the
layerwise reload, because a plain ``load_weights`` fails after start-up (the CPU backend has repacked its weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
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
from lightning_rft.explorer.engines.links import WeightLink, WeightReceiver
from lightning_rft.sync.transports.ipc import IPCLink
from lightning_rft.sync.transports.meeting import link_errors
from lightning_rft.sync.transports.nccl import NCCLLink

__all__ = ["BACKEND", "LinkWeightTransferEngine", "register"]

BACKEND = "lightning_rft"


@dataclass
class LinkInitInfo(WeightTransferInitInfo):
    """How this engine joins."""

    link: WeightLink | None = None


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
        link, member = init_info.link, self.parallel_config.rank
        if isinstance(link, NCCLLink):
            link.come(member)
            self._nccl = NCCLWeightTransferEngine(self.config, self.vllm_config, self.device, self.model)
            with torch.cuda.device(self.device), link_errors():  # vLLM takes the thread's current device
                self._nccl.init_transfer_engine(NCCLWeightTransferInitInfo(**link.init_info))
        elif isinstance(link, IPCLink):
            with torch.cuda.device(self.device):  # on which it opens what the trainer puts there
                self._receiver = link.open(member)
        elif link is not None:
            self._receiver = link.open(member)

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
            torch.accelerator.synchronize(self.device)

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
        names = {info.name: [info.name] for info in manifest if info.same_as is None}
        for info in manifest:
            if info.same_as is not None:
                names[info.same_as].append(info.name)
        tied: list[list[tuple[str, torch.Tensor]]] = []

        def load(arriving: Iterable[tuple[str, torch.Tensor]]) -> None:
            self.model.load_weights(_untied(arriving, names, tied))

        try:
            if self._nccl is not None:
                self._receive_by_nccl(self._nccl, [info for info in manifest if info.same_as is None], load)
            elif self._receiver is not None:
                load(self._receiver.receive(manifest))
            else:
                raise TransportError("weights were announced before the transport was joined")
        except (KeyError, ValueError) as error:
            raise TransportError(f"vLLM's model does not know a tensor that the trainer sent: {error}") from error
        for several in tied:
            self._load_tied(several)

    def _receive_by_nccl(
        self, nccl: NCCLWeightTransferEngine, sent: Sequence[TensorInfo], load: Callable[..., None]
    ) -> None:
        nccl.model = SimpleNamespace(load_weights=load)  # of which it calls nothing else
        info = NCCLWeightTransferUpdateInfo(
            names=[info.name for info in sent],
            dtype_names=[info.dtype for info in sent],
            shapes=[list(info.shape) for info in sent],
        )
        with torch.cuda.device(self.device), link_errors():
            nccl.receive_weights(info)

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
        nccl, self._nccl = self._nccl, None
        if nccl is not None:
            group = nccl.model_update_group
            nccl.shutdown()
            if group is not None:
                group.destroy()  # vLLM before 0.32 only forgets it


def _untied(
    arriving: Iterable[tuple[str, torch.Tensor]],
    names: Mapping[str, Sequence[str]],
    tied: list[list[tuple[str, torch.Tensor]]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what arrives, but puts weights that have several ``names`` aside, under each of them."""
    for name, tensor in arriving:
        if len(names.get(name, ())) == 1:
            yield name, tensor
        elif name in names:  # else it is an alias of one of these
            tied.append([(each, tensor) for each in names[name]])


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
