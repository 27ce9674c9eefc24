"""One run: a single call of ``fit``, ``validate`` or ``predict``, from its beginning or a checkpoint to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.buffer.reader import stored_keys
from lightning_rft.experience import GroupKey, Progress, Task
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.monitor.activity import Activity
from lightning_rft.monitor.spans import Span
from lightning_rft.monitor.status import StatusLine
from lightning_rft.run.agreement import Agreement
from lightning_rft.run.coordinator import Coordinator
from lightning_rft.run.dispatcher import Dispatcher
from lightning_rft.run.error_rate import ErrorRate
from lightning_rft.run.groups import Groups
from lightning_rft.run.placement import cpu_threads, takes_turns
from lightning_rft.run.resume import begin_or_resume, buffer_path, progress_at, restore_rng, rng_state
from lightning_rft.settings import Buffer, Sampling, Timeouts, Tolerance
from lightning_rft.sync.order import Order
from lightning_rft.sync.rule import Exploration, Rule
from lightning_rft.sync.schedule import Schedule
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.tasks.plan import TaskCursor, TaskPlan
from lightning_rft.tasks.source import Source
from lightning_rft.trainer.limits import micro_batches, stop_batch

__all__ = ["Run", "RunSettings"]


@dataclass(frozen=True)
class RunSettings:
    """What a run takes from its data module, under the names that it has there."""

    tasks: Sequence[Task] | Source
    steps_per_epoch: int
    shuffle: bool
    goes_on: bool
    tasks_per_step: int
    samples_per_task: int
    sampling: Sampling
    tolerance: Tolerance
    timeouts: Timeouts
    buffer: Buffer


class Run:
    """Opens the buffer, begins or resumes a run in it, and has the explorers start on it.

    Args:
        trainer: In the call that is the run.
        strategy: The trainer's sync strategy.
        pool: The explorers, started.
        settings: What is explored, and how.
        folder: The run's own folder.
        saved: What :meth:`state_dict` returned, to go on from there; empty for a new run.
        check_interrupt: Called during every wait; raises to end it.
        gathered: As a :class:`~lightning_rft.run.pusher.Pusher` takes it.
        observers: Called with every span of the timeline.

    Raises:
        ConfigurationError: The buffer cannot be opened, the checkpoint is of other settings, or the schedule can never
            make progress.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        strategy: SyncStrategy,
        pool: ExplorerPool,
        settings: RunSettings,
        *,
        folder: Path,
        saved: Mapping[str, Any],
        check_interrupt: Callable[[], None],
        gathered: Callable[..., Iterator[Any]],
        observers: Sequence[Callable[[Span], None]],
    ) -> None:
        self._trainer = trainer
        self._settings = settings
        self._explores_only = trainer.state.fn == TrainerFn.PREDICTING
        self._rule: Rule = Exploration() if self._explores_only else strategy
        self._cursor = TaskCursor(self._plan(), saved.get("cursor"))
        self._path = buffer_path(settings.buffer.path, saved, folder)
        progress = progress_at(trainer.global_step, saved, settings.samples_per_task)
        with ExitStack() as ends:
            self._ledger = Ledger.open(self._path)
            ends.callback(self._ledger.close)
            incarnation, ready = begin_or_resume(
                self._ledger, self._path, saved, progress, self._cursor, self._rule.max_staleness
            )
            dispatcher = Dispatcher(
                Schedule(self._order(progress, ready), settings.samples_per_task),
                self._groups(incarnation),
                pool,
                ErrorRate(settings.tolerance.max_error_rate, 2 * settings.tasks_per_step * settings.samples_per_task),
                Activity(observers),
                Agreement(settings.tolerance.push_gap, lambda: pool.dtype),
                timeouts=settings.timeouts,
                check_interrupt=check_interrupt,
                load_label=strategy.transport.load_label,
            )
            self.coordinator = Coordinator(
                dispatcher,
                strategy.transport,
                background=strategy.asynchronous,
                gathered=gathered,
                folder=folder,
                status=StatusLine(trainer),
                sleep_s=settings.timeouts.sleep_s if takes_turns(trainer, strategy, pool) else None,
            )
            if self._explores_only:
                ends.callback(self._tell_explored)
            ends.callback(self.coordinator.close)
            self.coordinator.start()
            if trainer.strategy.root_device.type == "cpu" and trainer.world_size == 1:
                before = torch.get_num_threads()
                ends.callback(torch.set_num_threads, before)
                torch.set_num_threads(min(before, cpu_threads(trainer, strategy, pool)[1]))
            if saved:
                restore_rng(saved["rng"])
            self._ends = ends.pop_all()

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: tasks, buffer, and the generators of random numbers."""
        self.coordinator.take_in(self._trainer.global_step)  # a callback may save before the strategy's hook comes
        return self.coordinator.state_dict() | {
            "path": None if self._path == ":memory:" else str(Path(self._path).absolute()),
            "samples_per_task": self._settings.samples_per_task,
            "rng": rng_state(),
        }

    def close(self) -> None:
        """Ends the run, closes the buffer and gives the trainer its threads back."""
        self._ends.close()

    def _plan(self) -> TaskPlan:
        """Which task is where; what limits leave out of exploring is what failed tasks are replaced with."""
        trainer, settings = self._trainer, self._settings
        items = micro_batches(trainer, settings.steps_per_epoch)
        trained = max(1, -(-items // trainer.accumulate_grad_batches))
        return TaskPlan(
            tasks=settings.tasks,
            tasks_per_step=settings.tasks_per_step,
            batches_per_epoch=settings.steps_per_epoch if self._explores_only else trained,
            shuffle=settings.shuffle,
            seed=settings.sampling.seed or 0,
            first_batch=trainer.global_step,
            first_epoch=trainer.current_epoch,
            goes_on=settings.goes_on,
        )

    def _order(self, progress: Progress, ready: Mapping[GroupKey, int]) -> Order:
        plan, buffer = self._cursor.plan, self._settings.buffer
        trains = micro_batches(self._trainer, self._settings.steps_per_epoch) > 0
        score = buffer.selection
        return Order(
            self._rule,
            plan.size,
            stop=stop_batch(self._trainer, plan.batches_per_epoch if trains else 0),
            capacity=None if self._explores_only else buffer.capacity,  # only training makes room
            progress=progress,
            ready=ready,
            scores={} if score is None else {group.key: score(group) for group in self._ledger.read(ready)},
        )

    def _groups(self, incarnation: int) -> Groups:
        settings, objective = self._settings, self._trainer.lightning_module.objective
        return Groups(
            self._ledger,
            self._cursor,
            settings.buffer,
            incarnation=incarnation,
            samples_per_task=settings.samples_per_task,
            min_samples=settings.tolerance.needed(settings.samples_per_task, bool(objective.needs_group)),  # type: ignore[union-attr]
            sampling=settings.sampling,
            max_staleness=self._rule.max_staleness,
        )

    def _tell_explored(self) -> None:
        """Says what there is to train on, and how; also of a run that was cut short."""
        counts, path = self._ledger.counts(), str(self._path)
        rank_zero_info(
            f"Explored {counts[State.READY]} groups into {path}, {counts[State.FAILED]} tasks failed. The file holds "
            f"{len(stored_keys(Path(path)))} groups: to train on them, set explorers=0 and buffer={path!r} in "
            "RFTDataModule or the config's data, and leave val_tasks and the sync strategy out"
        )
