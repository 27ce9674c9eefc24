"""Explorers on the trainer's GPUs, and on GPUs of their own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import lightning_rft as rft
from benchmarks.gpu.fits import data_module, loop
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Figures, Measurement, Skipped
from lightning_rft.explorer.placement import Sharing, place

__all__ = ["measurements"]


def measurements(machine: Machine) -> Iterator[Measurement]:
    """One explorer that shares the trainer's GPU; then as many as there are other GPUs."""
    yield Measurement("shared", partial(placed, machine, "shared", 1))
    yield Measurement("separate", partial(placed, machine, "separate", max(1, len(machine.gpus) - 1)))


def placed(machine: Machine, sharing: Sharing, explorers: int) -> Figures:
    """A run as planned; what cannot be placed is refused with the arithmetic."""
    if not machine.gpus:
        raise Skipped("no GPU")
    use_vllm = machine.vllm and not machine.quick
    engine: rft.Engine = rft.VLLMEngine() if use_vllm else rft.TransformersEngine()
    plan = place(machine.names, [0], explorers, engine.gpus, sharing)
    with data_module(machine, engine, explorers, sharing) as data:
        return {"plan": str(plan), "engine": type(engine).__name__, **loop(machine, rft.Synchronous(), data)}
