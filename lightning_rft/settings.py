"""What is set of a run, and the checks of it: before anything is started, and with an error that names the setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_rft.buffer.selection import Priority, Replay
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group, Task
from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.explorer.workflows.policy import Workflow
from lightning_rft.monitor.spans import Span
from lightning_rft.rewards import check_reward
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.trainer.module import RFTModule

__all__ = ["Settings", "check_counts", "check_source", "check_together", "sync_strategies", "sync_strategy"]


class Settings(Protocol):
    """What is set of a run; :class:`RFTDataModule`, which has all of it, says what each means."""

    tasks: list[Task]
    val_tasks: list[Task]
    reward: Callable[..., Any] | None
    engine: Engine
    explorers: int
    workflow: Workflow
    tasks_per_step: int
    samples_per_task: int
    max_new_tokens: int
    temperature: float
    shuffle: bool
    seed: int
    steps_per_epoch: int
    buffer: str | Path | None
    buffer_capacity: int | None
    group_filter: Callable[[Group], object] | None
    selection: Priority | None
    replay: Replay | None
    max_model_len: int | None
    retries: int
    min_samples: int | None
    max_error_rate: float
    reward_timeout_s: float
    sample_timeout_s: float
    rollout_timeout_s: float
    observers: list[Callable[[Span], None]]


def check_counts(
    *,
    tasks_per_step: int,
    samples_per_task: int,
    max_new_tokens: int,
    temperature: float,
    buffer_capacity: int | None,
    min_samples: int | None,
) -> None:
    """Checks the numbers that must fit each other.

    Raises:
        ConfigurationError: One is out of range.
    """
    counts = {
        "tasks_per_step": tasks_per_step,
        "samples_per_task": samples_per_task,
        "max_new_tokens": max_new_tokens,
    }
    for setting, count in counts.items():
        if count < 1:
            raise ConfigurationError(f"{setting}={count} must be at least 1")
    if not temperature > 0:
        raise ConfigurationError(f"temperature={temperature} must be above 0: greedy samples of a group are all equal")
    if buffer_capacity is not None and buffer_capacity < tasks_per_step:
        raise ConfigurationError(
            f"buffer_capacity={buffer_capacity} is below one batch of tasks_per_step={tasks_per_step} groups, so "
            f"no batch could ever be completed: set buffer_capacity to at least {tasks_per_step}"
        )
    if min_samples is not None and not 1 <= min_samples <= samples_per_task:
        raise ConfigurationError(f"min_samples={min_samples} must be 1 to samples_per_task={samples_per_task}")


def check_source(
    *, explores: bool, reward: Callable[..., Any] | None, buffer: str | Path | None, validates: bool, selects: bool
) -> None:
    """Checks that experience can come from where it shall.

    Args:
        explores: Whether it comes from explorers, or else from a stored buffer.
        reward: What explorers score with.
        buffer: The buffer's file.
        validates: Whether there are held-out tasks.
        selects: Whether ``group_filter``, ``selection`` or ``replay`` is set.

    Raises:
        ConfigurationError: Something that is needed is missing, or something is set that would not be heeded.
    """
    if explores:
        if reward is None:
            raise ConfigurationError("reward is missing: give a callable, or explorers=0 to train from a buffer")
        check_reward(reward)
    elif buffer is None or validates:
        raise ConfigurationError(
            "explorers=0 trains from a stored buffer: set buffer=... to its file, and leave val_tasks out, since "
            "nobody can answer them"
        )
    elif selects:
        raise ConfigurationError(
            "explorers=0 trains on all that is stored, epoch after epoch: leave group_filter, selection and replay out"
        )


def check_together(settings: Settings, trainer: L.Trainer) -> RFTModule:
    """Checks settings, trainer, strategy and module against each other, as far as that needs no file.

    Returns:
        The module.

    Raises:
        ConfigurationError: They do not go together.
    """
    predicts = trainer.state.fn == TrainerFn.PREDICTING
    if predicts and settings.explorers == 0:
        raise ConfigurationError("explorers=0 has nobody who explores: set explorers to 1 or more")
    if predicts and str(settings.buffer) == ":memory:":
        raise ConfigurationError(
            "buffer=':memory:' would be gone once the tasks are explored: set buffer to a file, or leave it out"
        )
    _check_strategy(settings, trainer)
    module = trainer.lightning_module
    if not isinstance(module, RFTModule):
        raise ConfigurationError(f"RFTDataModule feeds an RFTModule, not {type(module).__name__}: use or subclass it")
    if trainer.precision == "16-true":
        raise ConfigurationError(
            "Trainer(precision='16-true') lets small gradients vanish, since nothing scales the loss: set '16-mixed', "
            "or 'bf16-mixed' where the hardware multiplies bfloat16"
        )
    if settings.explorers > 0 and module.objective.needs_group and settings.samples_per_task < 2:
        raise ConfigurationError(
            f"samples_per_task={settings.samples_per_task} with {type(module.objective).__name__}, whose advantages "
            "are relative to the other samples of a task: set samples_per_task to 2 or more"
        )
    if trainer.state.fn == TrainerFn.VALIDATING and not settings.val_tasks:
        raise ConfigurationError("trainer.validate() needs RFTDataModule(val_tasks=[...])")
    return module


def sync_strategy(trainer: L.Trainer) -> SyncStrategy:
    """The one sync strategy among a trainer's callbacks.

    Raises:
        ConfigurationError: There is none, or more than one.
    """
    found = sync_strategies(trainer)
    if len(found) != 1:
        names = " and ".join(type(callback).__name__ for callback in found) or "none"
        raise ConfigurationError(
            f"Trainer(callbacks=[...]) needs exactly one sync strategy, but has {names}: give it one, such as "
            "lightning_rft.Synchronous()"
        )
    return found[0]


def sync_strategies(trainer: L.Trainer) -> list[SyncStrategy]:
    """All sync strategies among a trainer's callbacks."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SyncStrategy)]


def _check_strategy(settings: Settings, trainer: L.Trainer) -> None:
    if settings.explorers > 0:
        strategy = sync_strategy(trainer)
        strategy.check(settings.explorers)
        if settings.selection is not None:
            settings.selection.check(type(strategy).__name__, strategy.asynchronous)
        if settings.replay is not None:
            settings.replay.check(type(strategy).__name__, strategy.max_staleness)
    elif useless := sync_strategies(trainer):
        raise ConfigurationError(
            f"explorers=0 has nothing to synchronise: take {type(useless[0]).__name__} out of Trainer(callbacks=[...])"
        )
