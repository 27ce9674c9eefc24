"""Model folders written from a trained policy."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["write_model"]


def write_model(
    policy: PreTrainedModel,
    weights: dict[str, Tensor],
    origin: str,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None,
) -> None:
    """Writes weights in ``dtype``, or that of the model they come from, beside that model's tokenizer and configs."""
    from transformers import AutoConfig, AutoTokenizer

    AutoTokenizer.from_pretrained(origin).save_pretrained(path)
    config, generation = policy.config, policy.generation_config
    before = config.dtype
    try:
        # transformers refuses to write what it was ready to read, such as a temperature without do_sample
        policy.generation_config = type(generation)()
        dtype = dtype or AutoConfig.from_pretrained(origin).dtype or policy.dtype
        policy.save_pretrained(path, state_dict=_cast(policy, weights, dtype))
        config.dtype = dtype  # transformers has written that of the policy
        config.save_pretrained(path)
    finally:
        policy.generation_config, config.dtype = generation, before
    generation.to_json_file(Path(path) / "generation_config.json")


def _cast(policy: PreTrainedModel, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    once, every = (set(dict(policy.named_parameters(remove_duplicate=flag))) for flag in (True, False))
    kept = [re.compile(name) for name in getattr(policy, "_keep_in_fp32_modules_strict", None) or ()]
    return {
        name: tensor.to(dtype)
        if tensor.is_floating_point() and not any(pattern.search(name) for pattern in kept)
        else tensor
        for name, tensor in weights.items()
        if name not in every - once  # transformers knows the aliases of tied weights by their memory, which differs now
    }
