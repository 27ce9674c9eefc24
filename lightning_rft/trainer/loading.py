"""How the policy comes into memory: whole on one rank, or a shard on each, of which only rank 0 holds a whole copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rft.errors import ConfigurationError
from lightning_rft.model_folder import Pretrained, right_attention
from lightning_rft.trainer.lora import add_adapter
from lightning_rft.trainer.sharding import shard

if TYPE_CHECKING:
    import lightning as L
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

__all__ = ["check_adapter", "load_policy", "load_sharded", "without_memory"]

_Adapter = Mapping[str, Any] | None  # the settings of one


def load_policy(
    model: Pretrained,
    attn_implementation: str | None,
    sharding: L.Trainer | None = None,
    adapter: _Adapter = None,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Loads a model in float32, to be trained without dropout, into the CPU's memory, or sharded for a trainer's ranks.

    With an ``adapter``, whose settings these are, that alone is trained.
    """
    if sharding is None:
        policy = _load_whole(model, attn_implementation, adapter)
    else:
        strategy: Any = sharding.strategy
        half = torch.bfloat16 if sharding.precision == "bf16-mixed" else None
        policy = load_sharded(model, attn_implementation, strategy.device_mesh, strategy.root_device, half, adapter)
    policy.train()
    if gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def load_sharded(
    model: Pretrained,
    attn_implementation: str | None,
    mesh: DeviceMesh,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
    adapter: _Adapter = None,
) -> PreTrainedModel:
    """Loads a model as :func:`load_policy` does, but each rank of the mesh gets its shard alone, on its ``device``.

    Rank 0 reads the checkpoint and sends it, tensor by tensor.
    """
    policy = without_memory(model, attn_implementation, adapter)
    shard(policy, mesh, compute_dtype)
    policy.to_empty(device=device)
    leads = dist.get_rank() == 0
    source = _load_whole(model, attn_implementation, adapter) if leads else None
    _same_as_loaded(policy, source)
    held = {} if source is None else {**dict(source.named_parameters()), **dict(source.named_buffers())}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            _fill_shard(parameter, held.get(name))
        for name, buffer in policy.named_buffers():
            if leads:
                buffer.copy_(held[name])
            dist.broadcast(buffer, 0)  # rotary frequencies too, which no checkpoint has
    return policy


def _load_whole(model: Pretrained, attn_implementation: str | None, adapter: _Adapter) -> PreTrainedModel:
    config, settings = _settings(model, attn_implementation, adapter)
    policy: PreTrainedModel = model.load(config=config, **settings)
    if adapter is not None:
        add_adapter(policy, adapter)
    return policy


def check_adapter(model: Pretrained, adapter: Mapping[str, Any]) -> None:
    """Raises :class:`ConfigurationError` if an adapter does not fit a model, of which it loads no weights."""
    without_memory(model, None, adapter)


def without_memory(model: Pretrained, attn_implementation: str | None, adapter: _Adapter) -> PreTrainedModel:
    """Makes a policy whose tensors have shapes alone."""
    config, settings = _settings(model, attn_implementation, adapter)
    with torch.device("meta"):
        policy: PreTrainedModel = model.made(config, **settings)
        if adapter is not None:
            add_adapter(policy, adapter)
    return policy


def _settings(model: Pretrained, attn_implementation: str | None, adapter: _Adapter) -> tuple[Any, dict[str, Any]]:
    config = model.config()
    if adapter is not None and getattr(config, "quantization_config", None):
        raise ConfigurationError(
            f"model={model.name!r} is quantised, so an adapter cannot be merged into its weights exactly: set model to "
            "the one that was quantised, or leave peft_config out"
        )
    for name in vars(config):
        # With dropout the trainer would see other log-probs than the explorers on the very same weights.
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    # precision plugins take float32 from there
    return config, {"dtype": torch.float32, "attn_implementation": attn_implementation or right_attention(config)}


def _same_as_loaded(policy: PreTrainedModel, source: PreTrainedModel | None) -> None:
    """Gives every rank what loading, but not making, a model sets: what its checkpoint calls each weight, say."""
    found: list[Any] = [source and (source.generation_config, getattr(source, "_weight_conversions", None))]
    dist.broadcast_object_list(found)
    policy.generation_config, policy._weight_conversions = found[0]


def _fill_shard(parameter: Any, whole: Tensor | None) -> None:
    """Sends a whole tensor of rank 0's to the shards of a parameter."""
    from torch.distributed.tensor import distribute_tensor

    device = parameter.to_local().device
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device) if whole is None else whole.to(device)
    sent = distribute_tensor(whole.detach(), parameter.device_mesh, parameter.placements, src_data_rank=0)
    parameter.to_local().copy_(sent.to_local())
