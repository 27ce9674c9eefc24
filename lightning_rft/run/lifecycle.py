"""One run: a single call of ``fit``, ``validate`` or ``predict``, from its beginning or a checkpoint to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.buffer.reader import stored_keys
from lightning_rft.buffer.selection import Filter, ReplayMemory
from lightning_rft.experience import Task
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.monitor.spans import Span
from lightning_rft.monitor.status import StatusLine
from lightning_rft.run.coordinator import Coordinator
from lightning_rft.run.error_rate import ErrorRate
from lightning_rft.run.groups import Groups
from lightning_rft.run.placement import cpu_threads
from lightning_rft.run.resume import begin_or_resume, buffer_path, progress_at, restore_rng, rng_state
from lightning_rft.settings import Buffer, Sampling, Timeouts, Tolerance
from lightning_rft.sync.rule import Exploration
from lightning_rft.sync.schedule import Schedule
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.sync.transports.transport import Weights
from lightning_rft.tasks.plan import TaskCursor, TaskPlan
from lightning_rft.trainer.limits import micro_batches, stop_batch

__all__ = ["Run"]


class Run:
    """Opens the buffer, begins or resumes a run in it, and has the explorers start on it.

    Args:
        trainer: In the call that is the run.
        strategy: The trainer's sync strategy.
        pool: The explorers, started.
        tasks: What is answered.
        steps_per_epoch: Batches of an epoch.
        shuffle: Whether each epoch has an order of its own.
        tasks_per_step: Groups of a batch.
        samples_per_task: Samples of a group.
        sampling: How training samples.
        tolerance: How many samples may fail.
        timeouts: How long explorers may make no progress.
        buffer: Where experience is kept, and which groups are trained.
        observers: Called with every span of the timeline.
        folder: The run's own folder.
        saved: What :meth:`state_dict` returned, to go on from there; empty for a new run.
        check_interrupt: Called during every wait; raises to end it.
        gathered: Returns the policy's weights, whole; called on the trainer's thread.

    Raises:
        ConfigurationError: The buffer cannot be opened, the checkpoint is of other settings, or the schedule can never
            make progress.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        strategy: SyncStrategy,
        pool: ExplorerPool,
        *,
        tasks: Sequence[Task],
        steps_per_epoch: int,
        shuffle: bool,
        tasks_per_step: int,
        samples_per_task: int,
        sampling: Sampling,
        tolerance: Tolerance,
        timeouts: Timeouts,
        buffer: Buffer,
        observers: Sequence[Callable[[Span], None]],
        folder: Path,
        saved: Mapping[str, Any],
        check_interrupt: Callable[[], None],
        gathered: Callable[[], Weights],
    ) -> None:
        self._trainer = trainer
        explores_only = trainer.state.fn == TrainerFn.PREDICTING
        items = micro_batches(trainer, steps_per_epoch)
        progress = progress_at(trainer.global_step, saved, samples_per_task)
        cursor = TaskCursor(
            TaskPlan(
                tasks=tasks,
                tasks_per_step=tasks_per_step,
                # what limits leave out of exploring is what failed tasks are replaced with
                batches_per_epoch=steps_per_epoch
                if explores_only
                else max(1, -(-items // trainer.accumulate_grad_batches)),
                shuffle=shuffle,
                seed=sampling.seed or 0,
                first_batch=trainer.global_step,
                first_epoch=trainer.current_epoch,
            ),
            saved.get("cursor"),
        )
        score = buffer.selection
        self._path = path = buffer_path(buffer.path, saved, folder)
        self._samples_per_task = samples_per_task
        with ExitStack() as ends:
            ledger = Ledger.open(path)
            ends.callback(ledger.close)
            incarnation, ready = begin_or_resume(ledger, path, saved, progress, cursor, strategy.max_staleness)
            self.coordinator = Coordinator(
                schedule=Schedule(
                    Exploration() if explores_only else strategy,
                    size=cursor.plan.size,
                    samples=samples_per_task,
                    first=progress.version,
                    stop=stop_batch(trainer, cursor.plan.batches_per_epoch if items else 0),
                    capacity=None if explores_only else buffer.capacity,  # only training makes room
                    progress=progress,
                    ready=ready,
                    scores={} if score is None else {group.key: score(group) for group in ledger.read(ready)},
                ),
                groups=Groups(
                    ledger=ledger,
                    cursor=cursor,
                    incarnation=incarnation,
                    samples_per_task=samples_per_task,
                    min_samples=tolerance.needed(
                        samples_per_task,
                        bool(trainer.lightning_module.objective.needs_group),  # type: ignore[union-attr]
                    ),
                    sampling=sampling,
                    max_staleness=strategy.max_staleness,
                    group_filter=Filter(buffer.group_filter, tasks_per_step),
                    score=score,
                    replay=ReplayMemory(buffer.replay, tasks_per_step, strategy.max_staleness),
                ),
                pool=pool,
                error_rate=ErrorRate(tolerance.max_error_rate, 2 * tasks_per_step * samples_per_task),
                timeouts=timeouts,
                check_interrupt=check_interrupt,
                folder=folder,
                transport=strategy.transport,
                background=strategy.asynchronous,
                gathered=gathered,
                observers=observers,
                status=StatusLine(trainer),
            )
            if explores_only:
                ends.callback(_tell_explored, ledger, Path(path))
            ends.callback(self.coordinator.close)
            self.coordinator.start()
            if trainer.strategy.root_device.type == "cpu" and trainer.world_size == 1:
                before = torch.get_num_threads()
                ends.callback(torch.set_num_threads, before)
                torch.set_num_threads(min(before, cpu_threads(trainer, strategy, pool.count)[1]))
            if saved:
                restore_rng(saved["rng"])
            self._ends = ends.pop_all()

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: tasks, buffer, and the generators of random numbers."""
        self.coordinator.take_in(self._trainer.global_step)  # a callback may save before the strategy's hook comes
        return self.coordinator.state_dict() | {
            "path": None if self._path == ":memory:" else str(Path(self._path).absolute()),
            "samples_per_task": self._samples_per_task,
            "rng": rng_state(),
        }

    def close(self) -> None:
        """Ends the run, closes the buffer and gives the trainer its threads back."""
        self._ends.close()


def _tell_explored(ledger: Ledger, path: Path) -> None:
    """Says what there is to train on, and how; also of a run that was cut short."""
    counts = ledger.counts()
    rank_zero_info(
        f"Explored {counts[State.READY]} groups into {path}, {counts[State.FAILED]} tasks failed. The file holds "
        f"{len(stored_keys(path))} groups: to train on them, set explorers=0 and buffer={str(path)!r} in "
        "RFTDataModule or the config's data, and leave val_tasks and the sync strategy out"
    )
