"""The trainer's limits, counted in batches."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

__all__ = ["micro_batches", "micro_batches_done", "stop_batch", "validation_batches"]


def micro_batches(trainer: L.Trainer, batches: int) -> int:
    """Micro-batches of an epoch of ``batches`` batches, after ``limit_train_batches``."""
    whole = batches * trainer.accumulate_grad_batches
    limit = trainer.limit_train_batches  # type: ignore[attr-defined]
    return min(whole, limit) if isinstance(limit, int) else int(whole * limit)


def micro_batches_done(trainer: L.Trainer) -> int:
    """Micro-batches of the epoch that are trained; one that is being trained, or failed, is not."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(batches.processed)


def stop_batch(trainer: L.Trainer, per_epoch: int) -> int | None:
    """The batch at which the limits stop the trainer, inside ``fit``, ``validate`` or ``predict``; ``None`` for never.

    ``per_epoch`` counts the batches of an epoch that are trained.
    """
    if trainer.state.fn == TrainerFn.PREDICTING:
        return trainer.global_step + int(sum(trainer.num_predict_batches))
    if trainer.state.fn != TrainerFn.FITTING or per_epoch == 0:
        return trainer.global_step
    stops = []
    if trainer.max_steps not in (None, -1):
        stops.append(trainer.max_steps)
    if trainer.max_epochs not in (None, -1):
        epochs: Any = trainer.fit_loop.epoch_progress.current
        left = max(0, trainer.max_epochs - epochs.processed) * per_epoch
        # A run resumed from a checkpoint goes on in the middle of an epoch; after an exception, it begins anew
        if trainer.fit_loop.restarting and epochs.started > epochs.processed:
            left -= min(per_epoch, micro_batches_done(trainer) // trainer.accumulate_grad_batches)
        stops.append(trainer.global_step + left)
    return max(trainer.global_step, min(stops)) if stops else None


def validation_batches(trainer: L.Trainer) -> list[int]:
    """Batches of each loader in the current validation or test."""
    limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    limits = trainer.num_sanity_val_batches if trainer.sanity_checking else limits
    return list(map(int, limits))
