"""Gradients by the trainer's shortcuts beside those of the plain model in float32, for each attention.

The plain model has a row for every sample, eager attention and the logits of all tokens. In half precision its own
error says how much is rounding: a shortcut may be off by no more than a few times that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.batches import autocast, fast_path, policy, sharing
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Figures, Measurement, Refuted, skipped
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.packing import pack
from lightning_rft.trainer.shortcuts import random_groups

__all__ = ["measurements"]

FULL = "32-true"
GROUPS, SAMPLES = 2, 4
_TOLERANCE = 1e-4  # of float32, relative
_ROUNDINGS = 3.0  # times the error of the plain model in the same precision


class Computed(NamedTuple):
    """Of one forward and backward."""

    logprobs: Tensor  # [N]
    gradient: Tensor  # of all weights, one after another
    shared: bool
    chunked: bool


def measurements(machine: Machine) -> Iterator[Measurement]:
    """For each precision and each attention."""
    plain = functools.cache(functools.partial(computed, machine, "eager", fast=False))
    for precision in dict.fromkeys((FULL, machine.precision)):
        for attention in ("sdpa", "eager", "flex_attention"):
            what = f"{attention}, {precision}"
            if attention == "flex_attention" and machine.device == "cpu":
                yield skipped(what, "torch's flex_attention has no backward on CPUs")
            else:
                yield Measurement(what, functools.partial(compared, machine, attention, precision, plain))


def compared(machine: Machine, attention: str, precision: str, plain: Callable[[str], Computed]) -> Figures:
    """Errors relative to the plain model's gradient in float32."""
    exact, found = plain(FULL), computed(machine, attention, precision)
    error = distance(found.gradient, exact.gradient)
    bound = _TOLERANCE if precision == FULL else _ROUNDINGS * distance(plain(precision).gradient, exact.gradient)
    if not error <= bound:  # or NaN
        raise Refuted(f"the gradient is off by {error:.2g} of its norm, and rounding explains no more than {bound:.2g}")
    return {
        "gradient_error": error,
        "bound": bound,
        "logprob_error": float((found.logprobs - exact.logprobs).abs().mean()),
        "shared_rows": found.shared,
        "chunked_head": found.chunked,
    }


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative to the norm of the latter."""
    return float((found - exact).norm() / exact.norm())


def computed(machine: Machine, attention: str, precision: str, fast: bool = True) -> Computed:
    """One forward and backward of a weighted sum of log-probs, by the shortcuts or without."""
    model = policy(machine, attention)
    groups = random_groups(model, machine.work.prompt, 2 * machine.work.prompt, SAMPLES, GROUPS)
    packed, head = pack(groups, shared=False), None
    if fast:
        path = sharing(fast_path(machine, model, groups, attention, precision))
        packed, head = path.pack(groups), path.chunked_head
    with autocast(machine, precision):
        logprobs, _ = token_logprobs(model, packed.to(machine.device), chunked_head=head)
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(1))
    (logprobs * weights.to(machine.device)).sum().backward()
    parts = [parameter.grad.float().cpu().flatten() for parameter in model.parameters()]
    return Computed(
        logprobs.detach().cpu(), torch.cat(parts), packed.attention_mask is not None, chunked=head is not None
    )
