"""GPUs and CPU threads of explorers and trainer."""

from __future__ import annotations

import os

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_rft.hardware import available_cpus, gpus_for_explorers, share_cores
from lightning_rft.sync.strategy import SyncStrategy

__all__ = ["cpu_threads", "explorer_gpus"]


def explorer_gpus(trainer: L.Trainer, explorers: int, per_explorer: int) -> list[str] | None:
    """``CUDA_VISIBLE_DEVICES`` of every explorer; None if there are too few GPUs beside the trainer's."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(index) for index in range(count)] if not named else named.split(",")[:count]
    root = trainer.strategy.root_device
    used = trainer.device_ids if root.type == "cuda" else []
    return gpus_for_explorers(visible, used, explorers, per_explorer)


def cpu_threads(trainer: L.Trainer, strategy: SyncStrategy, explorers: int) -> tuple[int, int]:
    """CPU threads of each explorer and of the trainer."""
    trains_on_cpu = trainer.strategy.root_device.type == "cpu"
    overlap = trains_on_cpu and trainer.state.fn == TrainerFn.FITTING and strategy.overlaps
    return share_cores(available_cpus(), explorers, overlap=overlap)
