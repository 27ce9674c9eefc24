"""Short runs of the whole loop, and what is seen of them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

import lightning_rft as rft
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Refuted
from benchmarks.gpu.rewards import restless

__all__ = ["Watch", "best_engine", "data_module", "fit", "loop", "scratch"]


class Watch(L.Callback):
    """Notes the end of every step, its sampled tokens, what was logged, and the number of weights."""

    def __init__(self) -> None:
        self.weights = 0
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self._logged: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Counts the weights, tied ones once."""
        self.weights = sum(parameter.numel() for parameter in pl_module.parameters())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Waits for the device, whose work is only queued."""
        if not batch.last:
            return
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self.ends.append(time.perf_counter())
        self.tokens.append(sum(group.num_tokens for group in batch.groups))
        self._logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def logged(self, name: str) -> list[float]:
        """A metric, of all steps that have it."""
        return [metrics[name] for metrics in self._logged if name in metrics]


def best_engine(machine: Machine) -> rft.Engine:
    """Makes vLLM's where it is; for a quick look, one that computes nothing and is ready sooner."""
    if machine.quick:
        return rft.FakeEngine(mean_tokens=machine.work.tokens)
    return rft.VLLMEngine() if machine.vllm else rft.TransformersEngine()


def data_module(machine: Machine, engine: rft.Engine, explorers: int = 1, placement: Any = None) -> rft.RFTDataModule:
    """Tasks for explorers, which have GPUs of their own where there are enough, and else the trainer's."""
    work = machine.work
    enough = not machine.gpus or not engine.gpus or len(machine.gpus) > explorers * engine.gpus
    pool = rft.ExplorerPool(
        engine,
        explorers,
        placement=placement or ("auto" if enough else "shared"),
        log_dir=machine.folder / f"explorers-{type(engine).__name__}",
    )
    return rft.RFTDataModule(
        tasks=[f"{number} + 1 =" for number in range(work.steps * work.tasks)],
        reward=restless,
        explorers=pool,
        tasks_per_step=work.tasks,
        samples_per_task=work.samples,
        sampling=rft.Sampling(max_new_tokens=work.tokens, seed=0),
    )


@contextmanager
def scratch(machine: Machine) -> Iterator[Path]:
    """A folder for a run, which is removed."""
    with tempfile.TemporaryDirectory(dir=machine.folder) as folder:
        yield Path(folder)


def fit(
    machine: Machine,
    strategy: rft.SyncStrategy,
    data: rft.RFTDataModule,
    folder: Path,
    *,
    steps: int | None = None,
    callbacks: Sequence[L.Callback] = (),
    checkpoint: Path | None = None,
) -> rft.RFTModule:
    """Trains on one GPU, or the CPU, and returns what was trained."""
    module = rft.RFTModule(machine.model)
    L.Trainer(
        max_steps=steps or machine.work.steps,
        accelerator="gpu" if machine.gpus else "cpu",
        devices=1,
        precision=machine.precision,  # type: ignore[arg-type]
        callbacks=[strategy, *callbacks],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, data, ckpt_path=checkpoint)
    return module


def loop(
    machine: Machine, strategy: rft.SyncStrategy, data: rft.RFTDataModule, watch: Watch | None = None
) -> dict[str, float]:
    """Figures of one run, its first step left out: everything happens for the first time in it."""
    watch = watch or Watch()
    if machine.gpus:
        torch.cuda.reset_peak_memory_stats()
    with scratch(machine) as folder:
        fit(machine, strategy, data, folder, callbacks=[watch])
    if len(watch.ends) != machine.work.steps:
        raise Refuted(f"{len(watch.ends)} steps were trained, and {machine.work.steps} were asked for")
    stalest = max(watch.logged("rft/staleness_max"))
    if not 0 <= stalest <= strategy.max_staleness:
        raise Refuted(f"a token was {stalest:g} batches old, and the strategy promises {strategy.max_staleness}")
    seconds = watch.ends[-1] - watch.ends[0]
    figures = {
        "seconds_per_step": seconds / (len(watch.ends) - 1),
        "sampled_tokens_per_second": sum(watch.tokens[1:]) / seconds,
        "sync_s": statistics.median(watch.logged("rft/sync_s")[1:] or [0.0]),
        "staleness_max": stalest,
    }
    for name in ("push_gap", "sampling_gap"):
        if data.engine.computes and (found := watch.logged(f"rft/{name}")):
            figures[name] = max(found)
    if machine.gpus:
        figures["trainer_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures
