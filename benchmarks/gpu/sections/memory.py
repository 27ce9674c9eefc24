"""Peak memory of the output head and of micro-batches, beyond weights, gradients and optimizer.

On a GPU it is what the allocator had at most; on a CPU the profiler counts the allocator's events.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.batches import autocast, fast_path, policy
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Figures, Measurement
from benchmarks.memory import chunked, constant, naive
from benchmarks.memory import peak as peak_on_cpu
from lightning_rft.experience import Turn
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.micro_batches import by_group, micro_batches
from lightning_rft.trainer.packing import Packed, pack
from lightning_rft.trainer.shortcuts import random_groups
from lightning_rft.trainer.weighted import WeightedTurn

__all__ = ["measurements"]

SAMPLES = 8


def measurements(machine: Machine) -> Iterator[Measurement]:
    """The head's, and that of a group that is cut."""
    yield Measurement("output head", functools.partial(head, machine))
    yield Measurement("micro-batches", functools.partial(cut, machine))


def peak(machine: Machine, loss: Callable[[], Tensor]) -> float:
    """MiB at most during a forward and backward, above those at the begin."""
    if machine.device == "cpu":
        return peak_on_cpu(loss) / 2**20
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss().backward()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def loaded(machine: Machine) -> Any:
    """The policy, with gradients in place: what is measured is what comes on top of them."""
    model = policy(machine, "sdpa")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def head(machine: Machine) -> Figures:
    """Of log-probs in chunks and of all logits at once, above those of a loss that needs no head."""
    model, work = loaded(machine), machine.work
    groups = random_groups(model, work.prompt, work.tokens, SAMPLES)
    packed = pack(groups, shared=False).to(machine.device)

    def above(loss: Callable[[Any, Packed], Tensor]) -> float:
        def computed() -> Tensor:
            with autocast(machine, machine.precision):
                return loss(model, packed)

        return peak(machine, computed)

    above(constant)  # the first of a process is larger
    least, whole, parts = above(constant), above(naive), above(chunked)
    return {
        "tokens": len(packed.target),
        "vocabulary": model.config.get_text_config().vocab_size,
        "all_logits_mib": whole - least,
        "chunked_mib": parts - least,
    }


def cut(machine: Machine) -> Figures:
    """Of a group at a time, and in micro-batches with as many columns as its longest sample."""
    model, work = loaded(machine), machine.work
    groups = random_groups(model, work.prompt, work.tokens, SAMPLES)
    path = fast_path(machine, model, groups, "sdpa", machine.precision)
    weighted = [WeightedTurn(turn, 0, sample, turn.num_tokens) for sample, turn in enumerate(groups[0])]
    longest = work.prompt + work.tokens
    (pieces,) = micro_batches(weighted, 1, max_tokens=longest, columns=path.columns, shared=path.shared)

    def most(parts: list[list[list[Turn]]]) -> float:
        return max(peak(machine, functools.partial(computed, path.pack(part).to(machine.device))) for part in parts)

    def computed(packed: Packed) -> Tensor:
        with autocast(machine, machine.precision):
            return token_logprobs(model, packed, chunked_head=path.chunked_head)[0].sum()

    most([groups])
    return {
        "micro_batches": len(pieces),
        "whole_group_mib": most([groups]),
        "micro_batch_mib": most([by_group(piece) for piece in pieces]),
    }
