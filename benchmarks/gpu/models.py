"""Models that are made up, for machines without a network: weights are random, speed and memory are real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_rft.testing import tiny_model

__all__ = ["made_up"]

# 0.4 billion weights: large enough that matrix products dominate, and small enough for any card
LARGE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096, "initializer_range": 0.02,
}  # fmt: skip
# each id is a character of its own, so that answers, and with them rewards, differ
LARGE_VOCABULARY = 32768


def made_up(folder: Path, *, large: bool) -> Path:
    """Writes a tiny model, or one in which arithmetic dominates."""
    if not large:
        return tiny_model(folder)
    return enlarged(tiny_model(folder, vocab_size=LARGE_VOCABULARY), **LARGE)


def enlarged(folder: Path, **shape: Any) -> Path:
    """Gives a model's folder random weights of another shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    for name, value in shape.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
