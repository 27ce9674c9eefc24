"""The trainer and the data module that tests of whole runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

import lightning_rft as rft
from tests.processes import LightEngine

SUMS = [f"{index} + 1 =" for index in range(10)]


def quiet_trainer(folder: str | Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """A trainer on the CPU that validates, logs, saves and shows nothing, except as ``settings`` or callbacks ask."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "limit_val_batches": 0,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | settings)


def fake_data(**settings: Any) -> rft.RFTDataModule:
    """Ten sums for one explorer whose engine computes nothing; ``settings`` replace or complete these."""
    defaults: dict[str, Any] = {
        "tasks": SUMS,
        "reward": lambda completion, task: float(len(completion) % 3),
        "tasks_per_step": 4,
        "samples_per_task": 2,
        "max_new_tokens": 6,
    }
    if not isinstance(settings.get("explorers"), rft.ExplorerPool):
        defaults["engine"] = LightEngine(mean_tokens=4)
    return rft.RFTDataModule(**defaults | settings)


def seeded_data(**changes: Any) -> rft.RFTDataModule:
    """Tasks for a fake engine, in an order that a seed fixes, with rewards that differ between samples."""
    settings: dict[str, Any] = {
        "reward": lambda completion, task: float(sum(map(ord, completion)) % 7),
        "sampling": rft.Sampling(seed=3),
    }
    return fake_data(**settings | changes)


def stored_data(buffer: str | Path | rft.Buffer, **settings: Any) -> rft.RFTDataModule:
    """What a buffer holds, without explorers."""
    defaults: dict[str, Any] = {"buffer": buffer, "tasks_per_step": 4, "sampling": rft.Sampling(seed=1)}
    return rft.RFTDataModule(explorers=0, **defaults | settings)


def pool_of(data: rft.RFTDataModule) -> rft.ExplorerPool:
    """The explorers of a data module, to see which of them are there."""
    return data._pool
