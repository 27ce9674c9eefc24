"""Model folders written from a trained policy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_rft.trainer.gathering import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["write_model"]


def write_model(
    policy: PreTrainedModel, origin: str, path: str | os.PathLike[str], dtype: torch.dtype | None, *, writes: bool
) -> None:
    """Writes a policy in ``dtype``, or that of the model it comes from, beside that model's tokenizer and configs.

    All ranks gather it; the one that ``writes`` holds it whole, in the CPU's memory.
    """
    from transformers import AutoConfig, AutoTokenizer

    config, generation = policy.config, policy.generation_config
    before = config.dtype
    dtype = dtype or AutoConfig.from_pretrained(origin).dtype or policy.dtype
    weights = {name: tensor.to("cpu") for name, tensor in _cast(policy, dtype) if writes}
    if not writes:
        return
    AutoTokenizer.from_pretrained(origin).save_pretrained(path)
    try:
        # transformers refuses to write what it was ready to read, such as a temperature without do_sample
        policy.generation_config = type(generation)()
        policy.save_pretrained(path, state_dict=weights)
        config.dtype = dtype  # transformers has written that of the policy
        config.save_pretrained(path)
    finally:
        policy.generation_config, config.dtype = generation, before
    generation.to_json_file(Path(path) / "generation_config.json")


def _cast(policy: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields the state in a dtype, whole, without aliases: transformers knows those by their memory, which differs."""
    once, every = (set(dict(policy.named_parameters(remove_duplicate=flag))) for flag in (True, False))
    kept = [re.compile(name) for name in getattr(policy, "_keep_in_fp32_modules_strict", None) or ()]
    for name, tensor in policy.state_dict().items():
        if name not in every - once:
            casts = tensor.is_floating_point() and not any(pattern.search(name) for pattern in kept)
            yield name, whole(tensor, dtype) if casts else whole(tensor)
