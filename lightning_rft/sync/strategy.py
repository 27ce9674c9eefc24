"""The base of every sync strategy: a Lightning callback that says when explorers explore and when weights go back.

The base class owns *when hooks fire*; a strategy answers two questions, :meth:`SyncStrategy.admit` and
:meth:`SyncStrategy.publishes_after`, from which the schedule follows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_rft.errors import ConfigurationError, DeadlineError, ScheduleError
from lightning_rft.monitor.status import StatusLine
from lightning_rft.sync.changes import Changes
from lightning_rft.sync.collective import CollectiveTransport
from lightning_rft.sync.publisher import Publisher, Pushed, snapshot
from lightning_rft.sync.schedule import Rule
from lightning_rft.sync.transport import Transport, Weights

__all__ = ["Run", "SyncStrategy"]

_T = TypeVar("_T")


class Run(Pushed, Protocol):
    """What a strategy asks of the run that it drives."""

    @property
    def version(self) -> int:
        """Batches trained so far."""
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

    def late(self, explorer: int) -> None:
        """Notes that an explorer needs weights before the next push."""
        ...

    def metrics(self) -> dict[str, float]:
        """What the explorers did since the last call, in seconds, and what went wrong so far."""
        ...

    def summary(self) -> str:
        """One line about who waited for whom, and what to change."""
        ...


class Ranks(Protocol):
    """What a strategy asks of the trainer's ranks: only rank 0 has a run, and the others are told what came of it."""

    def agree(self, what: str, function: Callable[[], _T]) -> _T:
        """Calls a function on rank 0, and returns its result on every rank."""
        ...

    def gathered(self) -> Weights:
        """The policy's weights, whole; on rank 0 inside :meth:`agree`."""
        ...


class SyncStrategy(Callback, Rule):
    """Base class of the sync strategies.

    A strategy of your own says when a batch may be explored, and how stale that makes its tokens at most::

        class EveryOther(SyncStrategy):
            max_staleness = 1

            def admit(self, batch):
                return batch // 2 * 2

    :func:`lightning_rft.testing.check_strategy` tries it against the rules that every strategy keeps.

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
        self._ranks: Ranks | None = None
        self._run: Run | None = None
        self._publisher: Publisher | None = None
        self._pushed = -1  # the version whose weights were taken last
        self._changes = Changes()
        self._status = StatusLine(None)  # until the end of the first step

    def check(self, explorers: int) -> None:
        """Checks what a strategy needs of the data module, before anything is started; by default nothing.

        Raises:
            ConfigurationError: It cannot work with so many explorers.
        """

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

    # The first push: whichever of these comes first

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pushes the first version."""
        self._begin(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pushes the first version, if no training came before."""
        self._begin(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pushes the one version that explores."""
        self._begin(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pushes the first version, if no sanity check came before."""
        self._begin(trainer)

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
        self._status.say(f"training on batch {batch.batch}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the version up with a batch's last micro-batch and pushes if that is due."""
        if not batch.last:  # the hook fires for every micro-batch
            return
        logged = self._agree(f"the end of batch {batch.batch}", lambda: self._trained(batch.batch))
        self._end_status()
        pl_module.log("rft/version", logged.pop("rft/version"), prog_bar=True)
        pl_module.log_dict(logged)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pushes the last version, if it was not, so that what is sampled next is sampled with it."""
        self._agree("the end of training", self._finish)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends pushes; what was started is the data module's to end."""
        if self._run is not None:
            self._run.failed(exception)  # so that a push in the background does not go on
        with contextlib.suppress(DeadlineError):  # raised here, it would keep the data module from ending explorers
            self._end()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leaves the transport's group."""
        self._end()

    def load(self, explorer: int) -> None:
        """Has an explorer load what is published last; the schedule asks for it.

        A strategy that pushes in the background does it there. For the others this is an explorer that came up between
        two pushes, and it gets its weights when the trainer waits.
        """
        if self._publisher is not None:
            self._publisher.load(explorer)
        else:
            self._active.late(explorer)

    def bring(self, explorers: Sequence[int]) -> None:
        """Brings the weights of this moment to explorers that came up between two pushes; on the trainer's thread."""
        run = self._active
        began = time.monotonic()
        self.transport.push(self._gathered(), run.version, run.explorers, explorers)
        run.observe("trainer", self._push_is, began, run.version)

    @property
    def _push_is(self) -> str:
        """What a push is in the timeline."""
        return "write checkpoint" if self.transport.kind == "checkpoint" else "sync"

    def _begin(self, trainer: L.Trainer) -> None:
        if self._ranks is None:
            # the datamodule owns ranks and run; anything else was refused in its setup
            data = trainer.datamodule  # type: ignore[attr-defined]
            self._ranks = data.ranks
            self._agree("the first push", lambda: self._start(data.begin(self), trainer))

    def _start(self, run: Run, trainer: L.Trainer) -> None:
        self._run = run
        run.wait_ready()
        if self.asynchronous:
            self._publisher = Publisher(self.transport, run)
        self._status = StatusLine(trainer)
        with self._status:
            self._changes.since_last(self._push(), run.explorers.dtype)
            self._wait_loaded()
        self._status = StatusLine(trainer, bar_only=True)  # others write during a step

    def _trained(self, batch: int) -> dict[str, float]:
        """Counts the version up and pushes if that is due; what is to be logged of it."""
        run = self._active
        run.trained(batch)
        began = time.monotonic()
        due = run.wait_due()
        waited = time.monotonic()
        weights = self._push() if due else None
        logged = {
            "rft/version": float(run.version),
            "rft/wait_push_s": waited - began,
            "rft/sync_s": time.monotonic() - waited if due else 0.0,
        }
        if weights is not None:  # looked at when nobody waits for the push any more
            logged["rft/weights_changed"] = self._changes.since_last(weights, run.explorers.dtype)
        return logged | run.metrics()

    def _finish(self) -> None:
        run = self._active
        if self._pushed < run.version:
            self._push()
        self._wait_loaded()
        rank_zero_info(run.summary())

    def _push(self) -> Weights:
        """Brings the policy's weights to the explorers: now, or when the publisher comes to it; returns them."""
        run = self._active
        self._pushed = run.version
        self._status.say(f"pushing weights (version {run.version})")
        began = time.monotonic()
        weights = self._gathered()
        if self._publisher is not None:
            self._publisher.publish(snapshot(weights, run.explorers.dtype), run.version)
        else:
            self.transport.push(weights, run.version, run.explorers)
            run.observe("trainer", self._push_is, began, run.version)
            run.published(run.version)
        return weights

    def _wait_loaded(self) -> None:
        """Returns when what was pushed in the background has arrived."""
        run = self._active
        if self._publisher is not None:
            explorers = list(run.explorers.members())
            timeout_s = 2 * self.transport.timeout_s * max(1, len(explorers))
            setting = f"{type(self.transport).__name__}(timeout_s=...)"
            run.explorers.wait_loaded(run.version, explorers, timeout_s, setting)

    def _end(self) -> None:
        self._end_status()
        publisher, self._publisher = self._publisher, None
        self._ranks, self._run, self._pushed, self._changes = None, None, -1, Changes()
        try:
            if publisher is not None:
                publisher.close(self.transport.timeout_s)
        finally:
            self.transport.close()

    def _end_status(self) -> None:
        self._status.clear()
        self._status = StatusLine(None)

    def _agree(self, what: str, function: Callable[[], _T]) -> _T:
        assert self._ranks is not None, "a hook fired before the first push"
        return self._ranks.agree(what, function)

    def _gathered(self) -> Weights:
        assert self._ranks is not None, "weights were asked for before the first push"
        return self._ranks.gathered()

    @property
    def _active(self) -> Run:
        assert self._run is not None, "the run was asked for before the first push, or on a rank other than 0"
        return self._run
