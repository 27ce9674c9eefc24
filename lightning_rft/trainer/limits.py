"""The trainer's limits, counted in batches."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

__all__ = ["EpochProgress", "micro_batches", "stop_batch", "validation_batches"]


def micro_batches(trainer: L.Trainer, batches: int) -> int:
    """Micro-batches of an epoch of ``batches`` batches, after ``limit_train_batches``."""
    whole = batches * trainer.accumulate_grad_batches
    limit = trainer.limit_train_batches  # type: ignore[attr-defined]
    return min(whole, limit) if isinstance(limit, int) else int(whole * limit)


class EpochProgress:
    """Where the epoch stands, by the trainer's own count."""

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer

    @property
    def done(self) -> int:
        """Micro-batches that are trained; one that is being trained, or failed, is not."""
        batches: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        return int(batches.processed)

    def begin(self) -> None:
        """Notes that the epoch has begun, which Lightning does not after a checkpoint from the end of the one before.

        Else the next checkpoint looks as if it were between two epochs, and a run that resumes it begins the epoch
        anew. To be called when the first batch is asked for.
        """
        epochs: Any = self._trainer.fit_loop.epoch_progress
        if epochs.current.ready == epochs.current.processed:
            epochs.increment_ready()
            epochs.increment_started()


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
            left -= min(per_epoch, EpochProgress(trainer).done // trainer.accumulate_grad_batches)
        stops.append(trainer.global_step + left)
    return max(trainer.global_step, min(stops)) if stops else None


def validation_batches(trainer: L.Trainer) -> list[int]:
    """Batches of each loader in the current validation or test."""
    limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    limits = trainer.num_sanity_val_batches if trainer.sanity_checking else limits
    return list(map(int, limits))
