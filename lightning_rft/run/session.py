"""One call of the trainer, as each of its ranks sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.spec import ExplorerSpec, longest_prompt
from lightning_rft.monitor.spans import Span
from lightning_rft.run.checks import check_folder, sync_strategy
from lightning_rft.run.coordinator import Coordinator
from lightning_rft.run.lifecycle import Run, RunSettings
from lightning_rft.run.memory import check_memory
from lightning_rft.run.placement import cpu_threads, gpu_placement
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.trainer.offload import Offload, Turn
from lightning_rft.trainer.ranks import SIGTERM_STATUS, Ranks
from lightning_rft.trainer.warm_up import Texts, warm_up

__all__ = ["Session"]


class Session:
    """Brings the trainer's ranks together; rank 0's session holds the run, and all see what comes of it.

    Where nothing ``validates``, Lightning is kept from warning of an empty loader until :meth:`end`.
    """

    def __init__(self, trainer: L.Trainer, *, validates: bool) -> None:
        #: The run's own folder; asked for here, since on several ranks ``log_dir`` is a collective.
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "rft"
        self.ranks = Ranks.meet(trainer, self._together)
        #: Whether the run has begun, which only rank 0 has.
        self.begun = False
        self._offload = Offload(trainer)
        self._trainer = trainer
        self._run: Run | None = None
        self._max_model_len: int | None = None  # of explorers that start and take no memory of the trainer's
        self._limit_val_batches: float | None = None
        if not validates:
            self._limit_val_batches = trainer.limit_val_batches  # type: ignore[attr-defined]
            trainer.limit_val_batches = 0  # type: ignore[attr-defined]

    @property
    def fits(self) -> bool:
        """Whether the call is ``fit``."""
        return self._trainer.state.fn == TrainerFn.FITTING

    @property
    def coordinator(self) -> Coordinator:
        """What asks explorers; on rank 0 alone."""
        assert self._run is not None, "experience was asked for before the run began"
        return self._run.coordinator

    def start(self, pool: ExplorerPool, spec: ExplorerSpec) -> None:
        """Starts the explorers, with the GPUs and cores that the trainer leaves them."""
        strategy = sync_strategy(self._trainer)
        placement = gpu_placement(self._trainer, strategy, pool)
        threads, _ = cpu_threads(self._trainer, strategy, pool)
        check_memory(self._trainer, pool, placement)
        check_folder(self.folder)
        if pool.launcher.local and (placement.trainer or placement.explorers):
            rank_zero_info(placement.described(spec.engine.memory_share))
        pool.start(spec, self.folder, placement, threads)
        if not placement.beside_trainer:
            self._max_model_len = spec.max_model_len

    def begin(
        self,
        strategy: SyncStrategy,
        pool: ExplorerPool,
        settings: RunSettings,
        saved: Mapping[str, Any],
        observers: Sequence[Callable[[Span], None]],
    ) -> None:
        """Begins the run, or goes on from what was ``saved``, and pushes the first version."""

        def begin() -> None:
            assert pool.assigned, "begin before setup"
            self._run = Run(
                self._trainer,
                strategy,
                pool,
                settings,
                folder=self.folder,
                saved=saved,
                check_interrupt=self._check_interrupt,
                gathered=self.ranks.gathered,
                observers=observers,
            )
            self.coordinator.push_first(self._warm_up(settings))

        self.begun = True
        self.ranks.agree("the first push", begin)

    def _warm_up(self, settings: RunSettings) -> Iterable[Callable[[], None]]:
        """What the trainer can do while explorers start.

        Several ranks would have to do it together, while rank 0 alone knows when explorers have started. An engine on
        the same GPU measures how much memory is free there, which must not change meanwhile.
        """
        if self._max_model_len is None or not self.fits or isinstance(self._trainer.strategy, ParallelStrategy):
            return ()
        completion = settings.sampling.max_new_tokens or 1
        prompt = longest_prompt(self._max_model_len, completion)
        return warm_up(self._trainer.lightning_module, Texts(prompt, completion, settings.samples_per_task))

    def trained(self, batch: int) -> dict[str, float]:
        """Takes in that a batch was trained, and pushes the weights if that is due; returns what is to be logged."""
        gap = self._trainer.lightning_module.sampling_gap
        return self.ranks.agree(f"the end of batch {batch}", lambda: self.coordinator.trained(batch, gap))  # type: ignore[arg-type]

    def finish(self) -> None:
        """Pushes the last version, if it was not, so that what is sampled next is sampled with it."""

        def finish() -> None:
            self.coordinator.push_last()
            rank_zero_info(self.coordinator.summary())

        self.ranks.agree("the end of training", finish)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, for a checkpoint; empty where there is none."""
        return {} if self._run is None else self._run.state_dict()

    def fail(self, exception: BaseException) -> None:
        """Tells all ranks, and those that wait, of the exception that ends this one."""
        if isinstance(exception, SIGTERMException):
            exception.code = SIGTERM_STATUS  # Lightning by itself lets it exit with 0
        self.ranks.fail(exception)
        if self._run is not None:
            self.coordinator.failed(exception)  # so that a push in the background does not go on

    def end(self) -> dict[str, Any]:
        """Ends the run, but not the ranks' meeting; returns where training stood."""
        if self._limit_val_batches is not None:
            self._trainer.limit_val_batches = self._limit_val_batches  # type: ignore[attr-defined]
        self._offload.close()
        run, self._run = self._run, None
        if run is None:
            return {}
        try:
            return run.state_dict() if self.fits else {}
        finally:
            run.close()

    def _together(self, what: str | Turn, how: Any) -> Iterator[Any]:
        """What ranks do together: they gather ``"weights"`` or ``"scores"`` in a dtype, or take a turn on the GPUs."""
        if isinstance(what, Turn):
            return self._takes(what, within_batch=how)
        module: Any = self._trainer.lightning_module
        found: Iterator[Any] = {"weights": module.pushed, "scores": module.scored}[what](how)
        return found

    def _takes(self, turn: Turn, *, within_batch: bool) -> Iterator[Turn]:
        self._offload.take(turn, within_batch=within_batch)
        self._trainer.strategy.barrier()  # no explorer takes memory that some rank has not given back
        yield turn

    def _check_interrupt(self) -> None:
        self.ranks.check()
        if self._trainer.received_sigterm:
            raise SIGTERMException  # Lightning only looks after a batch, and there may never be one
