"""Checks of settings against each other, before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parallel import DistributedDataParallel

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.workflows.policy import Workflow
from lightning_rft.explorer.workflows.single_turn import SingleTurn
from lightning_rft.model_folder import check_policy
from lightning_rft.reward_calls import check_reward
from lightning_rft.settings import Buffer, Sampling, Tolerance
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.trainer.loading import check_adapter
from lightning_rft.trainer.module import RFTModule

__all__ = [
    *("check_counts", "check_folder", "check_source", "check_together", "check_unwrapped"),
    *("sync_strategies", "sync_strategy"),
]

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module")  # what torch.compile and FSDP1 call the module that they wrap


def check_counts(
    *, tasks_per_step: int, samples_per_task: int, sampling: Sampling, tolerance: Tolerance, buffer: Buffer
) -> None:
    """Raises ConfigurationError for numbers that do not fit each other."""
    for setting, count in {"tasks_per_step": tasks_per_step, "samples_per_task": samples_per_task}.items():
        if count < 1:
            raise ConfigurationError(f"{setting}={count} must be at least 1")
    sampling.check_trainable()
    if buffer.capacity is not None and buffer.capacity < tasks_per_step:
        raise ConfigurationError(
            f"Buffer(capacity={buffer.capacity}) is below one batch of tasks_per_step={tasks_per_step} groups, so no "
            f"batch could ever be completed: set capacity to at least {tasks_per_step}"
        )
    if tolerance.min_samples is not None and tolerance.min_samples > samples_per_task:
        raise ConfigurationError(
            f"Tolerance(min_samples={tolerance.min_samples}) must be at most samples_per_task={samples_per_task}"
        )


def check_source(
    reward: Callable[..., Any] | None, workflow: Workflow | None, buffer: Buffer, *, explores: bool, validates: bool
) -> None:
    """Raises ConfigurationError if explorers, or else the stored buffer, lack or ignore a setting."""
    if explores:
        if reward is not None:
            check_reward(reward)
        elif workflow is None or isinstance(workflow, SingleTurn):
            raise ConfigurationError(
                "reward is missing: give a callable, a workflow that returns Answer(text, reward=...), or explorers=0 "
                "to train from a buffer"
            )
        if not buffer.shuffle:
            raise ConfigurationError(
                "Buffer(shuffle=False) is for stored experience (explorers=0): set tasks=TaskSet(tasks, shuffle=False)"
            )
    elif buffer.path is None or validates:
        raise ConfigurationError(
            "explorers=0 trains from a stored buffer: set buffer=... to its file, and leave val_tasks out, since "
            "nobody can answer them"
        )
    elif buffer.group_filter or buffer.selection or buffer.replay or buffer.capacity or buffer.keep:
        raise ConfigurationError(
            "explorers=0 trains on all that is stored, epoch after epoch: leave the buffer's group_filter, selection, "
            "replay, capacity and keep out"
        )


def check_together(
    trainer: L.Trainer, *, explorers: int, buffer: Buffer, samples_per_task: int, validates: bool
) -> RFTModule:
    """Returns the module; ConfigurationError if settings, trainer, strategy and module do not go together."""
    predicts = trainer.state.fn == TrainerFn.PREDICTING
    if predicts and explorers == 0:
        raise ConfigurationError("explorers=0 has nobody who explores: set explorers to 1 or more")
    if predicts and str(buffer.path) == ":memory:":
        raise ConfigurationError(
            "buffer=':memory:' would be gone once the tasks are explored: set buffer to a file, or leave it out"
        )
    _check_strategy(trainer, explorers, buffer)
    module = trainer.lightning_module
    if not isinstance(module, RFTModule):
        raise ConfigurationError(f"RFTDataModule feeds an RFTModule, not {type(module).__name__}: use or subclass it")
    check_unwrapped(module)
    _check_features(trainer, module, validates)
    if module.peft_config is not None and module.policy is None:
        check_adapter(module.pretrained, module.peft_config)
    if trainer.precision == "16-true":
        raise ConfigurationError(
            "Trainer(precision='16-true') lets small gradients vanish, since nothing scales the loss: set '16-mixed', "
            "or 'bf16-mixed' where the hardware multiplies bfloat16"
        )
    if module.max_tokens_per_micro_batch is not None and trainer.accumulate_grad_batches > 1:
        raise ConfigurationError(
            f"RFTModule(max_tokens_per_micro_batch=...) with Trainer(accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}): either cuts a batch into micro-batches, so leave one of them out"
        )
    if explorers > 0 and module.objective.needs_group and samples_per_task < 2:
        raise ConfigurationError(
            f"samples_per_task={samples_per_task} with {type(module.objective).__name__}, whose advantages "
            "are relative to the other samples of a task: set samples_per_task to 2 or more"
        )
    if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING) and not validates:
        raise ConfigurationError(f"trainer.{trainer.state.fn.value}() needs RFTDataModule(val_tasks=[...])")
    return module


def check_unwrapped(module: L.LightningModule) -> None:
    """Raises ConfigurationError if the policy, once it is loaded, gives any weight another name than its folder."""
    assert isinstance(module, RFTModule)
    policy = module.policy
    check_policy(policy)
    for name, part in [] if policy is None else policy.named_modules():
        if isinstance(part, DistributedDataParallel) or any(inner in _WRAPPED for inner, _ in part.named_children()):
            raise ConfigurationError(
                f"policy.{name} is a {type(part).__name__}, whose weights have other names than the model's: leave the "
                "model of transformers as it is, without wrappers in it"
            )


def check_folder(folder: Path) -> None:
    """Creates a run's folder, private to its user; ConfigurationError if it cannot be written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"the run's folder {str(folder)!r} cannot be written ({error.strerror}): set "
            "Trainer(default_root_dir=...), and save_dir of its logger, to a folder that can"
        ) from error


def sync_strategy(trainer: L.Trainer) -> SyncStrategy:
    """The sync strategy among a trainer's callbacks; ConfigurationError unless there is exactly one."""
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


def _check_features(trainer: L.Trainer, module: RFTModule, validates: bool) -> None:
    """Refuses features of Lightning that cannot work here."""
    validates_in_fit = validates and trainer.state.fn == TrainerFn.FITTING and trainer.limit_val_batches != 0  # type: ignore[attr-defined]
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ConfigurationError(
            f"{type(trainer.strategy).__name__} gives the weights other names or keeps them for itself: set "
            "Trainer(strategy='ddp'), or ModelParallelStrategy to shard the model (FSDP2)"
        )
    if getattr(module, "_compiler_ctx", None) is not None:
        raise ConfigurationError(
            "torch.compile(module) would compile the training step anew for every batch, since no two have the same "
            "shapes: give the trainer the module itself"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateFinder | BatchSizeFinder):
            raise ConfigurationError(
                f"{type(callback).__name__}, or Tuner, takes the sync strategy out of the trainer's callbacks while it "
                "tries values: compare short runs, such as Trainer(max_steps=20), instead"
            )
        if isinstance(callback, StochasticWeightAveraging):
            raise ConfigurationError(
                "StochasticWeightAveraging copies the module before its model is loaded, so that it would average "
                "nothing: take EMAWeightAveraging"
            )
        if isinstance(callback, WeightAveraging) and validates_in_fit:
            raise ConfigurationError(
                f"{type(callback).__name__} swaps the average in while fit validates, but explorers answer with the "
                "weights that are trained: set Trainer(limit_val_batches=0), and call trainer.validate after fit"
            )


def _check_strategy(trainer: L.Trainer, explorers: int, buffer: Buffer) -> None:
    if explorers > 0:
        strategy = sync_strategy(trainer)
        strategy.check(explorers)
        if buffer.selection is not None:
            buffer.selection.check(type(strategy).__name__, strategy.asynchronous)
        if buffer.replay is not None:
            buffer.replay.check(type(strategy).__name__, strategy.max_staleness)
    elif useless := sync_strategies(trainer):
        raise ConfigurationError(
            f"explorers=0 has nothing to synchronise: take {type(useless[0]).__name__} out of Trainer(callbacks=[...])"
        )
