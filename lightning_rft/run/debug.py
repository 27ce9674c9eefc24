"""One task, answered a few times without training, to look at."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_rft.errors import ConfigurationError, ExplorerError
from lightning_rft.experience import Group, Task
from lightning_rft.run.transcript import transcript
from lightning_rft.settings import Buffer
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.sync.synchronous import Synchronous
from lightning_rft.tasks.source import Source, first
from lightning_rft.tasks.task_set import TaskSet
from lightning_rft.trainer.module import RFTModule
from lightning_rft.trainer.objectives.reinforce import REINFORCE

if TYPE_CHECKING:
    from lightning_rft.datamodule import RFTDataModule

__all__ = ["debug", "folder_to_remove"]

_told = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # where Lightning and a run log what is not wrong
_NO_FAILURE = 1e-6  # share of samples that may fail: the first error is what one wants to see


class _Explored(Callback):
    """Keeps the groups that were explored."""

    def __init__(self) -> None:
        self.groups: list[Group] = []

    @override
    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.groups += batch.groups


def folder_to_remove() -> Path:
    """A folder for what a run leaves, which is removed after it unless there is an error to look for."""
    return Path(tempfile.mkdtemp(prefix="lightning-rft-"))


def debug(
    trainer: L.Trainer,
    module: RFTModule,
    data: RFTDataModule,
    task: str,
    samples: int,
    ckpt_path: str | Path | None = None,
    weights_only: bool | None = None,
) -> None:
    """Explores one task by one explorer, as a run would, and prints what came of it."""
    level = _told.level
    _told.setLevel(logging.WARNING)  # how to train on what was explored would only mislead
    try:
        groups = _explored(trainer, module, data, task, samples, ckpt_path, weights_only)
        tokenizer = module.pretrained.other(data.engine.model).tokenizer()
        for group in groups:
            trainer.print(transcript(group, tokenizer, colour=_has_colour()))
    finally:
        _told.setLevel(level)
        if not isinstance(sys.exc_info()[1], ExplorerError):  # whose log is to be read
            shutil.rmtree(trainer.default_root_dir, ignore_errors=True)


def _explored(
    trainer: L.Trainer,
    module: RFTModule,
    data: RFTDataModule,
    task: str,
    samples: int,
    ckpt_path: str | Path | None,
    weights_only: bool | None,
) -> list[Group]:
    if samples < 1:
        raise ConfigurationError(f"--samples {samples} must be at least 1")
    if data.explorers == 0:
        raise ConfigurationError("explorers=0 has nobody who answers a task: add --data.explorers 1")
    _narrow(data, _chosen(data.tasks, task), samples)
    module.objective = REINFORCE()  # asks for no second sample, and is not asked anything else
    explored = _Explored()
    found = [callback for callback in trainer.callbacks if isinstance(callback, SyncStrategy)]  # type: ignore[attr-defined]
    strategy = Synchronous(transport=found[0].transport if found else None)
    trainer.callbacks = [c for c in trainer.callbacks if c not in found] + [strategy, explored]  # type: ignore[attr-defined]
    trainer.predict(module, data, return_predictions=False, ckpt_path=ckpt_path, weights_only=weights_only)
    return explored.groups


def _narrow(data: RFTDataModule, task: Task, samples: int) -> None:
    """Has a data module explore one task only."""
    data.tasks, data.task_set = [task], TaskSet([task], shuffle=False)
    data.steps_per_epoch = data.tasks_per_step = 1
    data.samples_per_task = samples
    data.val_sets, data.val_tasks = {}, []
    data.buffer = Buffer()
    data.tolerance = replace(data.tolerance, retries=0, min_samples=None, max_error_rate=_NO_FAILURE)
    pool = data._pool
    data.explorers = pool.count = 1
    pool.devices = pool.devices and pool.devices[:1]


def _chosen(tasks: Sequence[Task] | Source, wanted: str) -> Task:
    """The task with an id, or at a place."""
    for task in first(tasks):
        if task.id == wanted:
            return task
    if wanted.isdecimal():
        place = int(wanted)
        if isinstance(tasks, Source):
            return tasks.lane(shuffle=False, seed=0).at(place)
        if place < len(tasks):
            return tasks[place]
    count = "" if isinstance(tasks, Source) else f" among the {len(tasks)} tasks"
    raise ConfigurationError(f"--task {wanted}: no task has this id or place{count}")


def _has_colour() -> bool:
    """Whether the terminal shows colours, and the user wants them (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
