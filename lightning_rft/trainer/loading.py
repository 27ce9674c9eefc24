"""How the policy comes into memory: whole on one rank, or a shard on each, of which only rank 0 holds a whole copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rft.model_folder import right_attention
from lightning_rft.trainer.sharding import shard

if TYPE_CHECKING:
    import lightning as L
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

__all__ = ["load_policy", "load_sharded"]


def load_policy(model: str, attn_implementation: str | None, sharding: L.Trainer | None = None) -> PreTrainedModel:
    """Loads a model in float32, without dropout, into the CPU's memory, or sharded for a trainer's ranks."""
    from transformers import AutoModelForCausalLM

    if sharding is not None:
        strategy: Any = sharding.strategy
        half = torch.bfloat16 if sharding.precision == "bf16-mixed" else None
        return load_sharded(model, attn_implementation, strategy.device_mesh, strategy.root_device, half)
    config, settings = _settings(model, attn_implementation)
    policy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, config=config, **settings)
    return policy


def load_sharded(
    model: str,
    attn_implementation: str | None,
    mesh: DeviceMesh,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Loads a model as :func:`load_policy` does, but each rank of the mesh gets its shard alone, on its ``device``.

    Rank 0 reads the checkpoint and sends it, tensor by tensor.
    """
    from transformers import AutoModelForCausalLM

    config, settings = _settings(model, attn_implementation)
    with torch.device("meta"):
        policy: PreTrainedModel = AutoModelForCausalLM.from_config(config, **settings)
    shard(policy, mesh, compute_dtype)
    policy.to_empty(device=device)
    leads = dist.get_rank() == 0
    source = load_policy(model, attn_implementation) if leads else None
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


def _settings(model: str, attn_implementation: str | None) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
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
