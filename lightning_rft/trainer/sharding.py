"""Sharding of parameters, gradients and optimizer state over the trainer's ranks, with PyTorch's FSDP2, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_rft.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["shard", "whole"]


def shard(policy: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """Shards a transformers model, the same on every rank, over the data-parallel ranks, layer by layer.

    Its parameters become ``DTensor``. Those of the layers are gathered in ``compute_dtype``, that of autocast: in
    float32, twice as much would travel, and autocast would keep its own copy of every layer until the backward pass
    ends. Layers with torch's own norms stay in float32, since on CPUs those want weights and inputs alike. Gradients
    are summed in float32. The mesh is that of Lightning's ``ModelParallelStrategy``; raises
    :class:`ConfigurationError` if it asks for tensor parallelism.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigurationError(
            f"ModelParallelStrategy makes tensor_parallel_size={mesh['tensor_parallel'].size()}: set "
            "data_parallel_size to the number of devices and tensor_parallel_size=1"
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if any(isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) for module in policy.modules()):
        compute_dtype = None
    # Inputs stay as autocast has them: it adds up layers in float32.
    precision = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    # the modules that transformers would not split over devices: the decoder's layers
    whole = set(getattr(policy, "_no_split_modules", None) or ())
    for module in policy.modules():
        if type(module).__name__ in whole:
            fully_shard(module, mesh=mesh["data_parallel"], mp_policy=precision)
    fully_shard(policy, mesh=mesh["data_parallel"])


def whole(tensor: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor outside autograd, in ``dtype`` if given; one that is sharded is cast, then gathered by all ranks."""
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
