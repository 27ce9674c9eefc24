"""A run that stops half-way and goes on from its checkpoint, beside one that does not stop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_rft as rft
from benchmarks.gpu.fits import data_module, fit, scratch
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Figures, Measurement, Refuted
from lightning_rft.buffer.ledger import Ledger

__all__ = ["measurements"]

# Of the change of the weights. On CPUs nothing differs; on GPUs gradients are summed in an order that varies, and
# AdamW's first steps are as large for the smallest gradient, whose sign rounding decides, as for the largest.
_TOLERANCE = 0.1


def measurements(machine: Machine) -> Iterator[Measurement]:
    """One row."""
    yield Measurement("half-way, then on", partial(resumed, machine))


def resumed(machine: Machine) -> Figures:
    """Distance between both runs' weights; what is sampled follows from seeds alone, so that only training counts."""
    steps = machine.work.steps
    engine = rft.FakeEngine(mean_tokens=machine.work.tokens)
    with data_module(machine, engine) as data, scratch(machine) as folder:

        def run(name: str, steps: int, checkpoint: Path | None = None) -> tuple[Tensor, list[str]]:
            saves = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
            place = folder / name
            module = fit(machine, rft.Synchronous(), data, place, steps=steps, callbacks=[saves], checkpoint=checkpoint)
            with Ledger.open(place / "rft" / "buffer.sqlite") as ledger:
                return flat(module), ledger.trained_tasks()

        module = rft.RFTModule(machine.model)
        module.configure_model()
        begin = flat(module)
        whole, tasks = run("whole", steps)
        run("half", steps // 2)
        rest, tasks_of_rest = run("half", steps, folder / "half" / f"step={steps // 2}.ckpt")
    if tasks_of_rest != tasks:
        raise Refuted(f"the run that went on trained {tasks_of_rest}, the other {tasks}")
    difference = float((rest - whole).norm() / (whole - begin).norm())
    if not difference <= _TOLERANCE:
        raise Refuted(f"the weights of both runs differ by {difference:.2g} of what training changed")
    return {"weights_difference": difference, "steps": steps, "tasks": len(tasks)}


def flat(module: rft.RFTModule) -> Tensor:
    """All weights, one after another, in float32 on the CPU."""
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in module.parameters()])
