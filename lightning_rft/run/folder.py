"""A run's folder: the config that it was started with, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_rft.errors import ConfigurationError

__all__ = ["check_checkpoints", "check_run", "checkpoints", "config_of"]

_BLOCKS = ("seed_everything", "model", "data", "trainer")  # what subcommands share of a config


def check_run(run: Path) -> None:
    """Raises ConfigurationError unless a folder is a run's."""
    if not run.is_dir():
        raise ConfigurationError(f"{str(run)!r} is no folder: give the folder of a run, which holds rft/")
    if not (run / "rft").is_dir():
        inside = sorted(folder.parent for depth in ("*", "*/*", "*/*/*") for folder in run.glob(f"{depth}/rft"))
        hint = f", such as {str(inside[-1])!r}" if inside else ": the log folder of the trainer that trained"
        raise ConfigurationError(f"{str(run)!r} is no run's folder, since it holds no rft/: give one that does{hint}")


def config_of(run: Path, given: str | None) -> dict[str, Any]:
    """The config that a run was started with, from its folder or the ``given`` file, for another subcommand."""
    file = run / "config.yaml" if given is None else Path(given)
    if not file.is_file():
        raise ConfigurationError(
            f"{str(run)!r} holds no config.yaml, which a run from the command line leaves there: give "
            "--config FILE with the model, data and trainer of the run"
            if given is None
            else f"--config {given}: there is no such file"
        )
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{str(file)!r} cannot be read as a config: {error}") from error
    if not isinstance(config, dict) or not {"model", "data"} <= config.keys():
        raise ConfigurationError(f"{str(file)!r} has no model and data: give the config of a `fit`")
    return {name: config[name] for name in _BLOCKS if name in config}


def check_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder; ConfigurationError if there are none."""
    files = sorted(folder.glob("*.ckpt"))
    if not files:
        raise ConfigurationError(
            f"{str(folder)!r} holds no checkpoint: train with a ModelCheckpoint(save_top_k=-1), or give "
            "--checkpoints FOLDER if it saved elsewhere"
        )
    return files


def checkpoints(folder: Path, weights_only: bool | None) -> tuple[list[tuple[int, Path]], dict[Path, Exception]]:
    """The checkpoints in a folder, each with its step and in that order, and why others cannot be read.

    A ``last.ckpt`` of the same step as another is left out. Raises ConfigurationError if there are none.
    """
    found: list[tuple[int, Path]] = []
    broken: dict[Path, Exception] = {}
    for file in check_checkpoints(folder):
        try:
            found.append((_step(file, weights_only), file))
        except Exception as error:  # a damaged file can raise anything, and is named at the end
            broken[file] = error
    others = [step for step, file in found if not _is_last(file)]
    return sorted((step, file) for step, file in found if not (_is_last(file) and step in others)), broken


def _is_last(file: Path) -> bool:
    return file.name.startswith("last")


def _step(file: Path, weights_only: bool | None) -> int:
    single = file / "meta.pt" if file.is_dir() else file  # a sharded one is a folder
    # mapped, since the weights are not looked at yet
    return int(torch.load(single, map_location="cpu", mmap=True, weights_only=weights_only)["global_step"])
