"""The optimizer of a policy whose user chose none."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["adamw"]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW, at a learning rate for fine-tuning, without weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)
