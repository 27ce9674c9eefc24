"""The trainer's random number generators, kept in checkpoints so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["restore_rng", "rng_state"]


def rng_state() -> dict[str, Any]:
    """States of Python's and PyTorch's generators, the current device's included: tensors and plain values.

    NumPy's global one is left out: nothing here draws from it.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Puts the generators back to where :func:`rng_state` found them.

    Example:
        >>> before = rng_state()
        >>> drawn = torch.rand(1), random.random()
        >>> restore_rng(before)
        >>> drawn == (torch.rand(1), random.random())
        True
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
