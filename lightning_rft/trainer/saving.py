"""Folders written from a trained policy: a whole model, or an adapter alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rft.model_folder import Pretrained
from lightning_rft.trainer.lora import adapted, adapter_weights, base_state, lora_config, merged
from lightning_rft.trainer.sharding import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["write_policy"]


def write_policy(
    policy: PreTrainedModel,
    origin: Pretrained,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None,
    adapter: Mapping[str, Any] | None = None,
    *,
    writes: bool,
) -> None:
    """Writes a policy beside the tokenizer of the model that it comes from, or its ``adapter``, by the settings of it.

    All ranks gather what is written; the one that ``writes`` holds it whole, in the CPU's memory.
    """
    if adapter is None:
        _write_model(policy, origin, path, dtype, writes)
    else:
        _write_adapter(policy, adapter, origin, path, dtype, writes)
    if writes:
        origin.tokenizer().save_pretrained(path)


def _write_model(
    policy: PreTrainedModel, origin: Pretrained, path: str | os.PathLike[str], dtype: torch.dtype | None, writes: bool
) -> None:
    """Writes it with its configs, in ``dtype`` or that of its origin."""
    config, generation = policy.config, policy.generation_config
    before = config.dtype
    dtype = dtype or origin.config().dtype or policy.dtype
    weights = {name: tensor.to("cpu") for name, tensor in _cast(policy, dtype) if writes}
    if not writes:
        return
    try:
        # transformers refuses to write what it was ready to read, such as a temperature without do_sample
        policy.generation_config = type(generation)()
        policy.save_pretrained(path, state_dict=weights)
        config.dtype = dtype  # transformers has written that of the policy
        config.save_pretrained(path)
    finally:
        policy.generation_config, config.dtype = generation, before
    generation.to_json_file(Path(path) / "generation_config.json")


def _write_adapter(
    policy: PreTrainedModel,
    settings: Mapping[str, Any],
    origin: Pretrained,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None,
    writes: bool,
) -> None:
    """Writes it as peft does, in ``dtype`` or its own."""
    from safetensors.torch import save_file

    weights = {name: whole(tensor, dtype).to("cpu").contiguous() for name, tensor in adapter_weights(policy).items()}
    if not writes:
        return
    base = str(Path(origin.name).absolute()) if Path(origin.name).is_dir() else origin.name
    about = {"base_model_name_or_path": base, "revision": origin.revision}
    lora_config(settings, task_type="CAUSAL_LM", inference_mode=True, **about).save_pretrained(path)
    save_file(weights, Path(path) / "adapter_model.safetensors", metadata={"format": "pt"})


def _cast(policy: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields the state in a dtype, whole, without aliases: transformers knows those by their memory, which differs."""
    layers, seen = adapted(policy), set[int]()
    kept = [re.compile(name) for name in getattr(policy, "_keep_in_fp32_modules_strict", None) or ()]
    for name, tensor in base_state(policy).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            casts = tensor.is_floating_point() and not any(pattern.search(name) for pattern in kept)
            cast = dtype if casts else None
            yield name, merged(layers[name], cast) if name in layers else whole(tensor, cast)
