"""What a push takes by each transport, the load in the engine included."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import lightning_rft as rft
from benchmarks.gpu.fits import Watch, best_engine, data_module, fit, scratch
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Figures, Measurement, Refuted, Skipped

__all__ = ["measurements"]

# Each with a folder for what it writes. A further way to push is a further line, and perhaps a reason in refusal().
TRANSPORTS: dict[str, Callable[[Path], rft.SyncStrategy]] = {
    "Gloo": lambda folder: rft.Synchronous(transport=rft.CollectiveTransport("gloo")),
    "NCCL": lambda folder: rft.Synchronous(transport=rft.CollectiveTransport("nccl")),
    "checkpoint in memory": lambda folder: rft.Synchronous(transport=rft.CheckpointTransport()),
    "checkpoint on a disk": lambda folder: rft.Synchronous(transport=rft.CheckpointTransport(folder / "weights", 1)),
}


def measurements(machine: Machine) -> Iterator[Measurement]:
    """One short run each, to the same explorer."""
    with data_module(machine, best_engine(machine)) as data:
        for name, make in TRANSPORTS.items():
            yield Measurement(name, partial(pushed, machine, name, make, data))


def pushed(
    machine: Machine, name: str, make: Callable[[Path], rft.SyncStrategy], data: rft.RFTDataModule
) -> Figures:
    """The median push; the first of a run, before its first step, makes the connection and does not count."""
    if name.startswith("NCCL") and (reason := refusal(machine)):
        raise Skipped(reason)
    watch = Watch()
    with scratch(machine) as folder:
        module = fit(machine, make(folder), data, folder, callbacks=[watch])
    seconds = watch.logged("rft/sync_s")
    if len(seconds) != machine.work.steps:
        raise Refuted(f"{machine.work.steps} steps pushed {len(seconds)} times")
    median = statistics.median(seconds)
    weights = sum(parameter.numel() for parameter in module.parameters())
    return {"push_s": median, "million_weights": weights / 1e6, "million_weights_per_second": weights / median / 1e6}


def refusal(machine: Machine) -> str:
    """Why NCCL cannot connect trainer and explorer here; empty if it can."""
    if not machine.gpus:
        return "no GPU"
    if not machine.vllm or machine.quick:
        return "NCCL's other end is vLLM, which is " + ("left out by --quick" if machine.vllm else "not installed")
    if len(machine.gpus) < 2:
        return "NCCL refuses two processes on one GPU, and there is one"
    return ""
