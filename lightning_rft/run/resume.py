"""A run's state in checkpoints, and its beginning or resumption in the buffer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_rft.buffer.ledger import Ledger
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import GroupKey, Progress
from lightning_rft.tasks.plan import TaskCursor

__all__ = ["begin_or_resume", "buffer_path", "progress_at", "restore_rng", "rng_state", "run_state"]


def run_state(progress: Progress, cursor: TaskCursor, ledger: Ledger, incarnation: int) -> dict[str, Any]:
    """The state of a run as plain values, for a checkpoint."""
    return {
        "version": progress.version,
        "behind": sorted(map(list, progress.behind)),
        "ahead": sorted(map(list, progress.ahead)),
        "cursor": cursor.state_dict(),
        "incarnation": incarnation,
        "buffer": ledger.id,
    }


def progress_at(global_step: int, saved: Mapping[str, Any], samples_per_task: int) -> Progress:
    """What is part of the weights of a saved or, if ``saved`` is empty, a new run.

    Raises ConfigurationError if the checkpoint is of other settings or another step.
    """
    if not saved:
        return Progress(global_step)
    if saved["samples_per_task"] != samples_per_task:
        raise ConfigurationError(
            f"samples_per_task is {samples_per_task}, but {saved['samples_per_task']} in the checkpoint: set "
            "it as it was, or start a new run without ckpt_path"
        )
    if saved["version"] != global_step:
        raise ConfigurationError(
            f"ckpt_path was saved at global_step={global_step}, but with {saved['version']} batches trained: it was "
            "written in the middle of a step, or global_step was changed since. Use an earlier checkpoint"
        )
    behind, ahead = (frozenset(GroupKey(*key) for key in saved[name]) for name in ("behind", "ahead"))
    return Progress(global_step, behind, ahead)


def buffer_path(buffer: str | Path | None, saved: Mapping[str, Any], folder: Path) -> str | Path:
    """The buffer's file: as set, or that of the resumed run, or a new one in the run's folder."""
    if buffer is not None:
        return buffer
    before = saved.get("path")  # a resumed trainer may log to another folder
    return before if before and Path(before).exists() else folder / "buffer.sqlite"


def begin_or_resume(
    ledger: Ledger,
    path: str | Path,
    saved: Mapping[str, Any],
    progress: Progress,
    cursor: TaskCursor,
    max_staleness: int,
) -> tuple[int, dict[GroupKey, int]]:
    """Begins a new run in the buffer, or resumes the saved one.

    Returns the number of the incarnation, and the groups that are ready -> oldest version of their tokens.
    """
    resumed = None
    if saved and ledger.id == saved["buffer"]:
        resumed = ledger.resume(
            saved["incarnation"],
            progress,
            oldest=progress.version - max_staleness,
            expected=lambda key: (cursor.task(key).id, cursor.epoch(key)),
        )
    if saved and resumed is None:
        rank_zero_warn(
            f"the buffer {str(path)!r} is not the one that the checkpoint was saved with, was written on from another "
            "checkpoint since, or no longer holds all that was trained since the checkpoint, as Buffer(keep=...) says: "
            "what it held and was not trained is explored again"
        )
    return resumed or (ledger.begin(progress.version), {})


def rng_state() -> dict[str, Any]:
    """States of Python's and PyTorch's random generators, those of the current device included."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Restores what :func:`rng_state` returned.

    Example:
        >>> before = rng_state()
        >>> drawn = torch.rand(1), random.random()
        >>> restore_rng(before)
        >>> drawn == (torch.rand(1), random.random())
        True
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
