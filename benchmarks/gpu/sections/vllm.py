"""The four strategies with vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import lightning_rft as rft
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Measurement, skipped
from benchmarks.gpu.sections.strategies import with_engine

__all__ = ["measurements"]


def measurements(machine: Machine) -> Iterator[Measurement]:
    """A short run of each, where vLLM is installed."""
    if not machine.vllm:
        yield skipped("strategies", "vLLM is not installed")
    elif machine.quick:
        yield skipped("strategies", "vLLM takes its time to start: leave --quick out")
    else:
        yield from with_engine(machine, rft.VLLMEngine)
