"""Speed of training alone: forward, backward and optimizer on made-up batches, without sampling and without Lightning.

Operations are those that torch counts, of matrix products and attention; logits, which the chunked head computes twice,
count twice. They are set against what the card's data sheet says, and against what one large product reaches here.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.batches import autocast, fast_path, policy
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Figures, Measurement, Skipped
from benchmarks.gpu.peaks import card_tflops, measured_tflops, now
from lightning_rft.hardware import fast_dtype
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.shortcuts import random_groups

__all__ = ["measurements"]

GROUPS = 2


def measurements(machine: Machine) -> Iterator[Measurement]:
    """The peak, then a step with shared rows and one with a row for every sample."""
    dtype = getattr(torch, fast_dtype(machine.device))
    product = functools.cache(lambda: measured_tflops(machine.device, dtype, machine.work.multiplied))
    card = card_tflops(machine.gpus[0].name) if machine.gpus else None

    def peak() -> Figures:
        found: Figures = {"dtype": str(dtype).removeprefix("torch."), "measured_tflops": product()}
        return {**found, "card_tflops": card or "not known", **({"share": product() / card} if card else {})}

    yield Measurement("one large matrix product", peak)
    for name, shared in (("shared rows", True), ("a row per sample", False)):
        yield Measurement(name, functools.partial(speed, machine, shared, product, card))


def speed(machine: Machine, shared: bool, product: Callable[[], float], card: float | None) -> Figures:
    """Tokens and operations per second, as medians of several steps."""
    model: Any = policy(machine, "sdpa")
    groups = random_groups(model, machine.work.prompt, machine.work.tokens, machine.work.samples, GROUPS)
    path = fast_path(machine, model, groups, "sdpa", machine.precision)
    if shared and not path.shared:
        raise Skipped("the samples of a group cannot share rows of this model")
    packed = replace(path, shared=shared).pack(groups).to(machine.device)
    if shared and packed.attention_mask is None:
        raise Skipped("rows of their own are computed sooner at these lengths")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(machine, machine.precision):
            logprobs, _ = token_logprobs(model, packed, chunked_head=path.chunked_head)
        (-logprobs.mean()).backward()
        optimizer.step()

    step()  # the first of a process is slow
    with FlopCounterMode(display=False) as counter:
        step()
    if machine.gpus:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(machine.work.steps):
        began = now(machine.device)
        step()
        seconds.append(now(machine.device) - began)
    median = statistics.median(seconds)
    tflops = counter.get_total_flops() / median / 1e12
    figures: dict[str, float | str] = {
        "seconds_per_step": median,
        "trained_tokens_per_second": len(packed.target) / median,
        "columns_per_second": packed.input_ids.numel() / median,
        "tflops": tflops,
        "share_of_product": tflops / product(),
    }
    if card is not None:
        figures |= {"share_of_card": tflops / card}
    if machine.gpus:
        figures |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return figures
