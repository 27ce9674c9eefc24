"""The base of every sync strategy: a Lightning callback that says when explorers explore and when weights go back.

The base class owns *when hooks fire*; a strategy answers two questions, :meth:`SyncStrategy.admit` and
:meth:`SyncStrategy.publishes_after`, from which the schedule follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.sync.collective import CollectiveTransport
from lightning_rft.sync.transport import Explorers, Push, Transport

__all__ = ["Run", "SyncStrategy"]

_SIGTERM_STATUS = 143


class Run(Explorers, Protocol):
    """What a strategy asks of the run that it drives."""

    @property
    def version(self) -> int:
        """Batches trained so far."""
        ...

    @property
    def published_version(self) -> int:
        """The version that was pushed last; -1 before the first push."""
        ...

    def wait_ready(self) -> None:
        """Returns when every explorer's engine is up."""
        ...

    def trained(self, batch: int) -> None:
        """Tells that a batch is part of the weights."""
        ...

    def wait_due(self) -> bool:
        """Whether a push is due now, waiting first for what older weights must still explore."""
        ...

    def published(self, version: int) -> None:
        """Tells that a version was pushed."""
        ...


class SyncStrategy(Callback, ABC):
    """Base class of the sync strategies.

    A strategy of your own says when a batch may be explored::

        class EveryOther(SyncStrategy):
            max_staleness = 1

            def admit(self, batch):
                return batch // 2 * 2

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
        self._run: Run | None = None

    @property
    @abstractmethod
    def max_staleness(self) -> int:
        """Most batches that a token may lag behind the version that is trained."""

    @abstractmethod
    def admit(self, batch: int) -> int:
        """The version that an explorer must have loaded before it may start a group of ``batch``."""

    def publishes_after(self, batch: int) -> bool:
        """Whether weights are pushed once ``batch`` is trained."""
        return (batch + 1) % self.sync_interval == 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks that there is something to synchronise.

        Raises:
            ConfigurationError: The trainer was not given an ``RFTDataModule``.
        """
        if not hasattr(trainer.datamodule, "begin"):  # type: ignore[attr-defined]
            raise ConfigurationError(
                f"{type(self).__name__} needs an RFTDataModule: call trainer.fit(module, datamodule=RFTDataModule(...))"
            )

    # The first push: whichever of the three comes first

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pushes the first version."""
        self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pushes the first version, if no training came before."""
        self._begin(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pushes the first version, if no sanity check came before."""
        self._begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Checks that one batch is one optimizer step.

        Raises:
            ScheduleError: ``global_step`` and version have come apart.
        """
        if trainer.global_step != batch.batch:
            raise ScheduleError(
                f"batch {batch.batch} is about to be trained at global_step={trainer.global_step}: one optimizer step "
                "per batch is needed, so keep accumulate_grad_batches constant (no GradientAccumulationScheduler) and "
                "use one optimizer"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the version up with a batch's last micro-batch and pushes if that is due."""
        if not batch.last:  # the hook fires for every micro-batch
            return
        run = self._active
        run.trained(batch.batch)
        push = self._push(pl_module) if run.wait_due() else Push(0.0, 0.0)
        pl_module.log("rft/version", float(run.version), prog_bar=True)
        pl_module.log("rft/sync_s", push.seconds)
        if push.seconds:
            pl_module.log("rft/weights_changed", push.changed)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pushes the last version, if it was not, so that what is sampled next is sampled with it."""
        run = self._active
        if run.published_version < run.version:
            self._push(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Makes a run that SIGTERM ended exit with 143: Lightning by itself lets it exit with 0."""
        if isinstance(exception, SIGTERMException):
            exception.code = _SIGTERM_STATUS
        self._end()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leaves the transport's group."""
        self._end()

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._run is None:
            # the datamodule owns the run; anything else was refused in its setup
            self._run = trainer.datamodule.begin(self)  # type: ignore[attr-defined]
            self._active.wait_ready()
            self._push(pl_module)

    def _push(self, pl_module: L.LightningModule) -> Push:
        run = self._active
        weights: Iterable[tuple[str, torch.Tensor]] = pl_module.weights()  # type: ignore[operator]
        push = self.transport.push(weights, run.version, run)
        run.published(run.version)
        return push

    def _end(self) -> None:
        self.transport.close()
        self._run = None

    @property
    def _active(self) -> Run:
        assert self._run is not None, "a hook fired before the first push"
        return self._run
