"""Evaluation of a run's checkpoints, one after another, by one set of explorers."""

from __future__ import annotations

import csv
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_rft.monitor.curves import draw_curves, table
from lightning_rft.run.folder import check_run, checkpoints
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.trainer.module import RFTModule

if TYPE_CHECKING:
    from lightning_rft.datamodule import RFTDataModule

__all__ = ["evaluate", "trainer_settings"]

_LEFT_OUT = ("/version", "/pass@1")  # no run goes on, so that each is version 0; an old name


def trainer_settings(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a run's trainer for a look at its model, which logs nothing and writes into ``folder`` alone."""
    given = config["callbacks"] or []
    callbacks = given if isinstance(given, list) else [given]
    return {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "profiler": None,
        "fast_dev_run": False,
        "overfit_batches": 0.0,
        "limit_val_batches": config["limit_val_batches"] or None,
        "limit_predict_batches": None,
        "default_root_dir": str(folder),
        "callbacks": [callback for callback in callbacks if isinstance(callback, SyncStrategy | ProgressBar)],
    }


class _Began(Callback):
    """Notes whether the current validation has begun, for which everything must be loaded."""

    began = False

    def on_validation_start(self, *_: Any) -> None:
        self.began = True


def evaluate(
    trainer: L.Trainer,
    module: RFTModule,
    data: RFTDataModule,
    run: Path,
    folder: Path,
    weights_only: bool | None = None,
) -> list[str]:
    """Validates the model as it was, as step 0, and every checkpoint in a folder; shows and writes what comes of it.

    Returns what is wrong with checkpoints that could not be loaded. Any other error is raised.
    """
    check_run(run)
    found, broken = checkpoints(folder, weights_only)
    data.buffer = replace(data.buffer, path=":memory:")  # that of the run stays as it is
    loads = _Began()
    trainer.callbacks.insert(0, loads)  # type: ignore[attr-defined]  # before the strategy pushes
    rows: list[dict[str, Any]] = []
    with data:
        for step, path in [(0, None), *found]:
            loads.began = False
            try:
                with warnings.catch_warnings():
                    # callbacks that the run had for training are left out on purpose
                    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used")
                    sets = trainer.validate(module, data, path, verbose=False, weights_only=weights_only)
            except Exception as error:
                if path is None or loads.began:
                    raise
                # all but the checkpoint has worked before
                broken[path] = error
                rank_zero_warn(f"{path.name} cannot be loaded, and is left out: {error}")
                continue
            metrics = {name: value for one in sets for name, value in one.items() if not name.endswith(_LEFT_OUT)}
            names = sorted(metrics, key=lambda name: name.count("/"))  # those of all tasks first
            values = {name: metrics[name] for name in names}
            rows.append({"step": step, "checkpoint": path.name if path else ""} | values)
            if trainer.is_global_zero:
                _write(rows, run / "evaluation.csv")  # after each, for a run that is cut short
    trainer.print(table(rows))
    if trainer.is_global_zero:
        _draw(rows, run / "evaluation.png")
    rank_zero_info(f"Evaluated {len(rows) - 1} checkpoints, and the model before: {run / 'evaluation.csv'}")
    return [f"{path.name}: {error}" for path, error in broken.items()]


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        rank_zero_warn(
            f"matplotlib is not installed, so there is no {path.name}: pip install 'lightning-rft[timeline]'"
        )
    else:
        draw_curves(rows, path)
