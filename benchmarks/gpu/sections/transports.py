"""What a push takes by each transport, the load in the engine included, and how long a step is with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import lightning_rft as rft
from benchmarks.gpu.fits import Watch, best_engine, data_module, loop, scratch
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Figures, Measurement, Refuted, Skipped

__all__ = ["measurements"]

# Each with a folder for what it writes. A further way to push is a further line, and perhaps a reason in refusal().
WAYS: dict[str, Callable[[Path], rft.SyncStrategy]] = {
    "Gloo": lambda folder: rft.Synchronous(transport=rft.CollectiveTransport("gloo")),
    "NCCL": lambda folder: rft.Synchronous(transport=rft.CollectiveTransport("nccl")),
    "NCCL beside training, from a copy": lambda folder: rft.FullyAsynchronous(
        transport=rft.CollectiveTransport("nccl", background="snapshot")
    ),
    "NCCL beside training, blocking": lambda folder: rft.FullyAsynchronous(
        transport=rft.CollectiveTransport("nccl", background="blocking")
    ),
    "checkpoint in memory": lambda folder: rft.Synchronous(transport=rft.CheckpointTransport()),
    "checkpoint on a disk": lambda folder: rft.Synchronous(transport=rft.CheckpointTransport(folder, keep=1)),
}
SHARED: dict[str, Callable[[Path], rft.SyncStrategy]] = {
    "CUDA IPC, on the trainer's GPU": lambda folder: rft.Synchronous(transport=rft.CollectiveTransport("ipc")),
    "Gloo, on the trainer's GPU": WAYS["Gloo"],
}


def measurements(machine: Machine) -> Iterator[Measurement]:
    """One short run each, to the same explorer, and then to one on the trainer's GPU."""
    with data_module(machine, best_engine(machine)) as data:
        for name, make in WAYS.items():
            yield Measurement(name, partial(pushed, machine, name, make, data))
    engine = rft.TransformersEngine() if machine.quick else best_engine(machine)  # which has weights on a GPU
    with data_module(machine, engine, placement="shared") as data:
        for name, make in SHARED.items():
            yield Measurement(name, partial(pushed, machine, name, make, data))


def pushed(machine: Machine, name: str, make: Callable[[Path], rft.SyncStrategy], data: rft.RFTDataModule) -> Figures:
    """The median push, whose first makes the connection and is no part of a step; weights per second follow from it."""
    if reason := refusal(machine, name):
        raise Skipped(reason)
    watch = Watch()
    with scratch(machine) as folder:
        strategy = make(folder)
        figures = loop(machine, strategy, data, watch)
    if strategy.asynchronous:  # which training does not wait for
        return figures
    if not figures["sync_s"]:
        raise Refuted("nothing was pushed")
    return {**figures, "million_weights_per_second": watch.weights / figures["sync_s"] / 1e6}


def refusal(machine: Machine, name: str) -> str:
    """Why there can be no such push here; empty if there can."""
    if name not in SHARED and not name.startswith("NCCL"):
        return ""
    if not machine.gpus:
        return "no GPU"
    if name in SHARED:
        return ""
    if not machine.vllm or machine.quick:
        return "NCCL's other end is vLLM, which is " + ("left out by --quick" if machine.vllm else "not installed")
    if len(machine.gpus) < 2:
        return "NCCL refuses two processes on one GPU, and there is one"
    return ""
