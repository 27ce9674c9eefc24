"""Base class of the sync strategies."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.sync.rule import Rule
from lightning_rft.sync.transports.collective import CollectiveTransport
from lightning_rft.sync.transports.transport import Transport

__all__ = ["SyncStrategy"]


class SyncStrategy(Callback, Rule):
    """Base class of the sync strategies: callbacks that decide when explorers explore and when weights are pushed.

    A strategy of your own says which version a batch may be explored with, and bounds the staleness of its tokens::

        class EveryOther(SyncStrategy):
            max_staleness = 1

            def admit(self, batch):
                return batch // 2 * 2

    Override :meth:`pushes_after` to push other than every ``sync_interval`` batches.
    :func:`lightning_rft.testing.check_strategy` checks the rules that every strategy must keep.

    Args:
        sync_interval: Batches between two pushes.
        transport: How weights travel; left out, :class:`CollectiveTransport`.

    Raises:
        ConfigurationError: ``sync_interval`` is below 1.
    """

    def __init__(self, sync_interval: int = 1, transport: Transport | None = None) -> None:
        if sync_interval < 1:
            raise ConfigurationError(f"sync_interval={sync_interval} must be at least 1: it counts batches")
        self.sync_interval = sync_interval
        self.transport = transport or CollectiveTransport()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "publishes_after" in vars(cls):
            raise ConfigurationError(f"{cls.__name__}.publishes_after is called pushes_after now: rename it")
        if "staggered" in vars(cls):
            raise ConfigurationError(
                f"{cls.__name__}.staggered is called loading now, the share of the explorers that may load at the same "
                "time: set loading = 0.0 for one after another, or leave it out"
            )

    def check(self, explorers: int) -> None:
        """Raises :class:`ConfigurationError` if the strategy cannot work with so few explorers."""

    @override
    def pushes_after(self, batch: int) -> bool:
        return (batch + 1) % self.sync_interval == 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not hasattr(_run_of(trainer), "begin"):
            raise ConfigurationError(
                f"{type(self).__name__} needs an RFTDataModule: call trainer.fit(module, datamodule=RFTDataModule(...))"
            )

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _run_of(trainer).begin(self)

    # The first of these that fires begins the run and pushes the first version.
    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = on_train_start = _begin

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != batch.batch:
            raise ScheduleError(
                f"batch {batch.batch} is about to be trained at global_step={trainer.global_step}: one optimizer step "
                "per batch is needed, so keep accumulate_grad_batches constant (no GradientAccumulationScheduler) and "
                "use one optimizer"
            )

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not batch.last:  # the hook fires for every micro-batch
            return
        logged = _run_of(trainer).trained(batch.batch)
        pl_module.log("rft/version", logged.pop("rft/version"), prog_bar=True)
        pl_module.log_dict(logged)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _run_of(trainer).finish()


def _run_of(trainer: L.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]  # it owns the run
