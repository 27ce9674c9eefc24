"""The datamodule: where tasks, explorers, buffer and loader meet, and the owner of all that is started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import Self

from lightning_rft.buffer.filters import Filter
from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.buffer.policies import Priority, Replay, ReplayMemory
from lightning_rft.buffer.stored import StoredExperience, stored_keys
from lightning_rft.coordinator import Coordinator
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group, GroupKey, Progress
from lightning_rft.explorer.context import fitting_length
from lightning_rft.explorer.engine import Engine
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.tolerance import Tolerance
from lightning_rft.explorer.vllm_engine import VLLMEngine
from lightning_rft.explorer.worker import ExplorerSpec
from lightning_rft.explorer.workflow import SingleTurn, Workflow
from lightning_rft.hardware import available_cpus, gpus_for_explorers, share_cores
from lightning_rft.model_folder import check_model
from lightning_rft.monitor.spans import Span
from lightning_rft.ranks import SIGTERM_STATUS, Ranks
from lightning_rft.rewards import check_reward
from lightning_rft.sync.exploration import Exploration
from lightning_rft.sync.schedule import Schedule
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.tasks import TaskCursor, TaskPlan, Tasks, read_tasks
from lightning_rft.trainer.loader import ExperienceLoader, ExplorationLoader, ValidationLoader
from lightning_rft.trainer.module import RFTModule
from lightning_rft.trainer.rng import restore_rng, rng_state

__all__ = ["RFTDataModule"]


class RFTDataModule(L.LightningDataModule):
    """Turns tasks into experience: starts explorers, hands them tasks, and feeds the trainer what comes back.

    Explorers live as long as one ``fit``, ``validate`` or ``predict``; inside ``with data:`` they live until its end::

        with data:
            trainer.validate(module, data)
            trainer.fit(module, data)

    ``trainer.predict(module, data)`` explores every task once with the weights as they are, and trains nothing: the
    groups stay in the buffer, as a further run of the file if there is one. Only the strategy's transport matters then.

    With ``explorers=0`` it trains from a stored buffer, in epochs over its groups, with neither tasks nor strategy::

        data = RFTDataModule(explorers=0, buffer="rft/buffer.sqlite", tasks_per_step=8)

    Args:
        tasks: Tasks to train on: :class:`Task` objects, dictionaries, plain prompts, or the path of a JSONL file.
        reward: ``reward(completion, task)``, any callable, plain or ``async``, that returns a finite number.
        engine: What samples; left out, :class:`VLLMEngine`.
        explorers: Number of explorer processes, each with an engine of its own; 0 trains from ``buffer`` alone; or an
            :class:`ExplorerPool`, which is then this data module's to end.
        workflow: How a task is answered; left out, :class:`SingleTurn`.
        tasks_per_step: Groups of one batch, which is one optimizer step.
        samples_per_task: Samples of one group.
        max_new_tokens: Most tokens of one answer.
        temperature: Softmax temperature of training samples, above 0.
        val_tasks: Held-out tasks, answered greedily for validation.
        shuffle: Whether every epoch has an order of its own.
        seed: Seeds order and sampling; left out, the one of ``seed_everything``, else 0.
        steps_per_epoch: Batches of an epoch; needed when ``tasks`` has no length.
        buffer: File of the buffer, or ``":memory:"``; left out, ``rft/buffer.sqlite`` in the trainer's log folder, or
            when a run is resumed the file that it had.
        buffer_capacity: Most groups that may be explored ahead of training; left out, what the strategy admits.
        group_filter: ``group_filter(group)``, called once for every complete group; where it returns false, the group's
            task has ended and the next one takes its place. :func:`~lightning_rft.has_signal` is one. It runs in the
            trainer's process, while explorers are listened to: it should be quick.
        selection: Which groups are trained first under an asynchronous strategy; left out, the oldest.
        replay: Has groups trained more than once; left out, each is trained once.
        max_model_len: Most tokens of prompt and answer together; left out, what the prompts need, or with a workflow
            of your own the model's context.
        retries: How often a sample is tried again when its reward or workflow raised.
        min_samples: A group in which fewer samples succeed has failed, and another task takes its place; left out, half
            of ``samples_per_task``, and 2 where advantages are relative to the group.
        max_error_rate: Share of the samples of the last two batches that may fail; more end the run with the first
            error.
        reward_timeout_s: Seconds that one reward may take.
        sample_timeout_s: Seconds that one sample may take, reward included.
        start_timeout_s: Seconds within which engines must be ready.
        rollout_timeout_s: Seconds without progress (no engine step, no reward) after which an explorer that has work is
            ended, and another started.

    Raises:
        ConfigurationError: A setting cannot work; the message names it.
    """

    def __init__(
        self,
        tasks: Tasks = (),
        reward: Callable[..., Any] | None = None,
        engine: Engine | None = None,
        explorers: int | ExplorerPool = 1,
        workflow: Workflow | None = None,
        tasks_per_step: int = 8,
        samples_per_task: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        val_tasks: Tasks | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        steps_per_epoch: int | None = None,
        buffer: str | Path | None = None,
        buffer_capacity: int | None = None,
        group_filter: Callable[[Group], object] | None = None,
        selection: Priority | None = None,
        replay: Replay | None = None,
        max_model_len: int | None = None,
        retries: int = 2,
        min_samples: int | None = None,
        max_error_rate: float = 0.3,
        reward_timeout_s: float = 60.0,
        sample_timeout_s: float = 600.0,
        start_timeout_s: float = 600.0,
        rollout_timeout_s: float = 600.0,
    ) -> None:
        super().__init__()
        counts = {
            "tasks_per_step": tasks_per_step,
            "samples_per_task": samples_per_task,
            "max_new_tokens": max_new_tokens,
        }
        for setting, count in counts.items():
            if count < 1:
                raise ConfigurationError(f"{setting}={count} must be at least 1")
        if not temperature > 0:
            raise ConfigurationError(
                f"temperature={temperature} must be above 0: greedy samples of a group are all equal"
            )
        if buffer_capacity is not None and buffer_capacity < tasks_per_step:
            raise ConfigurationError(
                f"buffer_capacity={buffer_capacity} is below one batch of tasks_per_step={tasks_per_step} groups, so "
                f"no batch could ever be completed: set buffer_capacity to at least {tasks_per_step}"
            )
        if min_samples is not None and not 1 <= min_samples <= samples_per_task:
            raise ConfigurationError(f"min_samples={min_samples} must be 1 to samples_per_task={samples_per_task}")
        self.tasks_per_step = tasks_per_step
        self.samples_per_task = samples_per_task
        self.max_error_rate = max_error_rate
        self.group_filter = group_filter
        self.selection = selection
        self.replay = replay
        self._new_tolerance()  # checks it
        self._new_filter()  # checks it too
        if explorers != 0:
            if reward is None:
                raise ConfigurationError("reward is missing: give a callable, or explorers=0 to train from a buffer")
            check_reward(reward)
        elif buffer is None or val_tasks is not None:
            raise ConfigurationError(
                "explorers=0 trains from a stored buffer: set buffer=... to its file, and leave val_tasks out, since "
                "nobody can answer them"
            )
        elif group_filter or selection or replay:
            raise ConfigurationError(
                "explorers=0 trains on all that is stored, epoch after epoch: leave group_filter, selection and replay "
                "out"
            )
        at_most = steps_per_epoch and steps_per_epoch * tasks_per_step
        self.tasks = [] if explorers == 0 else read_tasks(tasks, "tasks", at_most)
        self.val_tasks = [] if val_tasks is None else read_tasks(val_tasks, "val_tasks", None)
        self.reward = reward
        self._stored: StoredExperience | None = None
        if isinstance(explorers, ExplorerPool):
            if engine is not None and engine is not explorers.engine:
                raise ConfigurationError("engine=... and explorers=ExplorerPool(...): give the engine to the pool only")
            self._pool = explorers
        else:
            self._pool = ExplorerPool(engine or VLLMEngine(), explorers or 1)
        self.engine = self._pool.engine
        self.explorers = explorers if isinstance(explorers, int) else explorers.count
        self.workflow = workflow or SingleTurn()
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.shuffle = shuffle
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        if explorers == 0:
            self._stored = StoredExperience(
                str(buffer),
                tasks_per_step=tasks_per_step,
                shuffle=shuffle,
                seed=self.seed,
                version=lambda: self._trainer.global_step,
            )
            steps_per_epoch = self._stored.batches
        self.steps_per_epoch = steps_per_epoch or TaskPlan.batches(len(self.tasks), tasks_per_step)
        self.buffer = buffer
        self.buffer_capacity = buffer_capacity
        self.max_model_len = max_model_len
        self.retries = retries
        self.min_samples = min_samples
        self.reward_timeout_s = reward_timeout_s
        self.sample_timeout_s = sample_timeout_s
        self.start_timeout_s = start_timeout_s
        self.rollout_timeout_s = rollout_timeout_s
        #: Called with every :class:`~lightning_rft.monitor.timeline.Span` of a run.
        self.observers: list[Callable[[Span], None]] = []
        #: The trainer's ranks; only rank 0 starts anything.
        self.ranks = Ranks()
        self._run: Coordinator | None = None
        self._ledger: Ledger | None = None
        self._folder = Path()  # the run's own, from setup on
        self._path: str | Path = ""
        self._held = False
        self._limit_val_batches: float | None = None  # of the trainer, where there is nothing to validate on
        self._threads_before: int | None = None  # of the trainer, where they are fewer during a run
        self._restored: dict[str, Any] = {}  # from a checkpoint, until the run that resumes it begins
        self._last: dict[str, Any] = {}  # for a checkpoint that is saved after the run

    # What is started here is stopped here, on every path

    def __enter__(self) -> Self:
        """Keeps the explorers alive between calls of the trainer."""
        self._held = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the explorers."""
        self._held = False
        self._stop()

    def setup(self, stage: str) -> None:
        """Checks everything that can be known, then starts the explorers, which load while the trainer does.

        Raises:
            ConfigurationError: A setting, or a combination of settings, cannot work.
        """
        module = self._checked()
        # here, since on several ranks log_dir is a collective
        self._folder = Path(self._trainer.log_dir or self._trainer.default_root_dir) / "rft"
        self.ranks.close()
        self.ranks = Ranks.meet(self._trainer, module.weights)
        self.ranks.agree("setup", lambda: self._start_explorers(module))
        module.temperature = self.temperature
        if not self.val_tasks and self._limit_val_batches is None:  # else Lightning warns of an empty loader
            self._limit_val_batches = self._trainer.limit_val_batches  # type: ignore[attr-defined]
            self._trainer.limit_val_batches = 0  # type: ignore[attr-defined]

    def _start_explorers(self, module: RFTModule) -> None:
        if self._stored is None and not self._pool.assigned:
            assert self.reward is not None, "checked in __init__"
            model = self.engine.model or module.model
            check_model(model)
            self.engine.check()
            spec = ExplorerSpec(
                engine=self.engine,
                model=model,
                workflow=self.workflow,
                reward=self.reward,
                max_new_tokens=self.max_new_tokens,
                max_model_len=fitting_length(
                    model,
                    [task.prompt for task in [*self.tasks, *self.val_tasks]],
                    max_new_tokens=self.max_new_tokens,
                    max_model_len=self.max_model_len,
                    single_turn=isinstance(self.workflow, SingleTurn),
                ),
                seed=self.seed,
                retries=self.retries,
                reward_timeout_s=self.reward_timeout_s,
                sample_timeout_s=self.sample_timeout_s,
            )
            self._pool.start(spec, self.start_timeout_s, self._folder, self._gpus(), self._threads[0])

    def begin(self, strategy: SyncStrategy) -> Coordinator:
        """Starts the run of this call of the trainer under a strategy; called by the strategy, once."""
        assert self._pool.assigned, "begin before setup"
        trainer, items = self._trainer, self._items
        saved = self._restored if self._fits else {}
        self._restored = {}
        if self._fits:
            self._last = {}
        if saved and saved["samples_per_task"] != self.samples_per_task:
            raise ConfigurationError(
                f"samples_per_task is {self.samples_per_task}, but {saved['samples_per_task']} in the checkpoint: set "
                "it as it was, or start a new run without ckpt_path"
            )
        progress = _progress(saved, trainer.global_step)
        cursor = TaskCursor(
            TaskPlan(
                tasks=self.tasks,
                tasks_per_step=self.tasks_per_step,
                # what limits leave out of exploring is what failed tasks are replaced with
                batches_per_epoch=self.steps_per_epoch
                if self._explores_only
                else max(1, -(-items // trainer.accumulate_grad_batches)),
                shuffle=self.shuffle,
                seed=self.seed,
                first_batch=trainer.global_step,
                first_epoch=trainer.current_epoch,
            ),
            saved.get("cursor"),
        )
        self._ledger = self._opened(saved)
        incarnation, ready = self._incarnate(saved, progress, cursor, strategy.max_staleness)
        self._run = Coordinator(
            schedule=Schedule(
                Exploration() if self._explores_only else strategy,
                size=cursor.plan.size,
                first=progress.version,
                stop=self._stop_batch(cursor.plan.batches_per_epoch if items else 0),
                capacity=None if self._explores_only else self.buffer_capacity,  # only training makes room
                progress=progress,
                ready=ready,
                scores=self._scores(ready),
            ),
            cursor=cursor,
            pool=self._pool,
            ledger=self._ledger,
            incarnation=incarnation,
            samples_per_task=self.samples_per_task,
            min_samples=self._min_samples,
            tolerance=self._new_tolerance(),
            temperature=self.temperature,
            progress_timeout_s=self.rollout_timeout_s,
            check_interrupt=self._check_interrupt,
            group_filter=self._new_filter(),
            score=self.selection,
            replay=ReplayMemory(self.replay, self.tasks_per_step, strategy.max_staleness),
            folder=self._folder,
            strategy=strategy,
            observers=self.observers,
        )
        self._run.start()
        if trainer.strategy.root_device.type == "cpu" and trainer.world_size == 1:
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(min(self._threads_before, self._threads[1]))
        if saved:
            restore_rng(saved["rng"])
        return self._run

    def _opened(self, saved: Mapping[str, Any]) -> Ledger:
        """The buffer's file: as set, or the one of the run that is resumed, or a new one."""
        path = self.buffer
        if path is None:
            before = saved.get("path")  # a resumed trainer may log to another folder
            path = before if before and Path(before).exists() else self._folder / "buffer.sqlite"
        self._path = path
        return Ledger.open(path)

    def _incarnate(
        self, saved: Mapping[str, Any], progress: Progress, cursor: TaskCursor, max_staleness: int
    ) -> tuple[int, dict[GroupKey, int]]:
        """Begins a new run in the buffer, or goes on with the one that is resumed and what of it can still be used."""
        assert self._ledger is not None
        resumed = None
        if saved and self._ledger.id == saved["buffer"]:
            resumed = self._ledger.resume(
                saved["incarnation"],
                progress,
                oldest=progress.version - max_staleness,
                expected=lambda key: (cursor.task(key).id, cursor.epoch(key)),
            )
        if saved and resumed is None:
            rank_zero_warn(
                f"the buffer {str(self._path)!r} is not the one that the checkpoint was saved with, or was written on "
                "from another checkpoint since: what it held and was not trained is explored again"
            )
        return resumed or (self._ledger.begin(progress.version), {})

    def _scores(self, ready: Iterable[GroupKey]) -> dict[GroupKey, float]:
        """Scores of what a resumed run starts with."""
        if self.selection is None:
            return {}
        assert self._ledger is not None
        return {group.key: self.selection(group) for group in self._ledger.read(ready)}

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: tasks, buffer, and the generators of random numbers. Of rank 0, which saves it."""
        return self._state() | {"rng": rng_state()} if self._run is not None else self._last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what a checkpoint holds for the run that resumes it."""
        self._restored = state_dict

    def _state(self) -> dict[str, Any]:
        path = None if self._path == ":memory:" else str(Path(self._path).absolute())
        return self._active.state_dict() | {"path": path, "samples_per_task": self.samples_per_task}

    def teardown(self, stage: str) -> None:
        """Ends the run, and the explorers unless they are held by ``with``."""
        try:
            self._end_run()
            if not self._held:
                self._stop()
        finally:
            self.ranks.close()

    def on_exception(self, exception: BaseException) -> None:
        """Ends everything: after an exception Lightning calls no teardown.

        A run that SIGTERM ended exits with 143: Lightning by itself lets it exit with 0.
        """
        if isinstance(exception, SIGTERMException):
            exception.code = SIGTERM_STATUS
        self.ranks.fail(exception)
        try:
            self._stop()
        finally:
            self.ranks.close()

    # What Lightning iterates over

    def train_dataloader(self) -> ExperienceLoader:
        """One epoch of experience."""
        self.ranks.mind_sigterm()
        stored = self._stored
        return ExperienceLoader(
            lambda: self._active if stored is None else stored,
            self.ranks,
            batches=self.steps_per_epoch,
            accumulate=self._trainer.accumulate_grad_batches,
            items=self._items,
            max_staleness=self._strategy.max_staleness if stored is None else None,
        )

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """Greedy answers to the held-out tasks."""
        self.ranks.mind_sigterm()  # Lightning asks for loaders as soon as its own handler is there
        if not self.val_tasks:
            return []
        chunk = self.tasks_per_step * self.samples_per_task
        agree = self.ranks.agree
        # every rank gets all answers: there is nothing to compute on them, and all log the same
        return ValidationLoader(
            lambda: agree("the start of validation", lambda: self._explore_validation(chunk)),
            lambda index: agree(f"validation task {index}", lambda: self._active.explored(index)),
            len(self.val_tasks),
            chunk,
        )

    def predict_dataloader(self) -> ExplorationLoader:
        """Every task once, explored with the weights as they are."""
        self.ranks.mind_sigterm()
        return ExplorationLoader(lambda index: self._active.kept(index), self.ranks, self.steps_per_epoch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves the batch where it is: the training step makes its tensors on the device."""
        return batch

    def _explore_validation(self, chunk: int) -> int:
        trainer = self._trainer
        limits = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        tasks = self.val_tasks[: int(limits[0]) * chunk]
        self._active.explore(tasks, samples=1, temperature=0.0)
        return len(tasks)

    # How

    @property
    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None, "the datamodule is not attached to a trainer"
        return self.trainer

    @property
    def _fits(self) -> bool:
        return self._trainer.state.fn == TrainerFn.FITTING

    @property
    def _explores_only(self) -> bool:
        return self._trainer.state.fn == TrainerFn.PREDICTING

    @property
    def _active(self) -> Coordinator:
        assert self._run is not None, "experience was asked for before the run began"
        return self._run

    @property
    def _strategies(self) -> list[SyncStrategy]:
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, SyncStrategy)]

    @property
    def _strategy(self) -> SyncStrategy:
        found = self._strategies
        if len(found) != 1:
            names = " and ".join(type(callback).__name__ for callback in found) or "none"
            raise ConfigurationError(
                f"Trainer(callbacks=[...]) needs exactly one sync strategy, but has {names}: give it one, such as "
                "lightning_rft.Synchronous()"
            )
        return found[0]

    def _new_tolerance(self) -> Tolerance:
        return Tolerance(self.max_error_rate, 2 * self.tasks_per_step * self.samples_per_task)

    def _new_filter(self) -> Filter:
        return Filter(self.group_filter, self.tasks_per_step)

    @property
    def _min_samples(self) -> int:
        if self.min_samples is not None:
            return self.min_samples
        needed = 2 if self._trainer.lightning_module.objective.needs_group else 1  # type: ignore[union-attr]
        return min(self.samples_per_task, max(needed, -(-self.samples_per_task // 2)))

    @property
    def _items(self) -> int:
        """Micro-batches of an epoch, after ``limit_train_batches``."""
        whole = self.steps_per_epoch * self._trainer.accumulate_grad_batches
        limit = self._trainer.limit_train_batches  # type: ignore[attr-defined]
        return min(whole, limit) if isinstance(limit, int) else int(whole * limit)

    def _stop_batch(self, per_epoch: int) -> int | None:
        """The batch at which the trainer will stop by ``max_steps`` or ``max_epochs``."""
        trainer = self._trainer
        if self._explores_only:
            return trainer.global_step + int(sum(trainer.num_predict_batches))
        if not self._fits or per_epoch == 0:
            return trainer.global_step
        stops = []
        if trainer.max_steps not in (None, -1):
            stops.append(trainer.max_steps)
        if trainer.max_epochs not in (None, -1):
            stops.append(trainer.global_step + max(0, trainer.max_epochs - trainer.current_epoch) * per_epoch)
        return max(trainer.global_step, min(stops)) if stops else None

    def _checked(self) -> RFTModule:
        """The module, after all checks that need no file."""
        trainer = self._trainer
        if self._explores_only and self._stored is not None:
            raise ConfigurationError("explorers=0 has nobody who explores: set explorers to 1 or more")
        if self._explores_only and str(self.buffer) == ":memory:":
            raise ConfigurationError(
                "buffer=':memory:' would be gone once the tasks are explored: set buffer to a file, or leave it out"
            )
        if self._stored is None:
            strategy = self._strategy
            strategy.check(self.explorers)
            if self.selection is not None:
                self.selection.check(type(strategy).__name__, strategy.asynchronous)
            if self.replay is not None:
                self.replay.check(type(strategy).__name__, strategy.max_staleness)
        elif self._strategies:
            raise ConfigurationError(
                f"explorers=0 has nothing to synchronise: take {type(self._strategies[0]).__name__} out of "
                "Trainer(callbacks=[...])"
            )
        module = trainer.lightning_module
        if not isinstance(module, RFTModule):
            raise ConfigurationError(
                f"RFTDataModule feeds an RFTModule, not {type(module).__name__}: use or subclass it"
            )
        if self._stored is None and module.objective.needs_group and self.samples_per_task < 2:
            raise ConfigurationError(
                f"samples_per_task={self.samples_per_task} with {type(module.objective).__name__}, whose advantages "
                "are relative to the other samples of a task: set samples_per_task to 2 or more"
            )
        if trainer.state.fn == TrainerFn.VALIDATING and not self.val_tasks:
            raise ConfigurationError("trainer.validate() needs RFTDataModule(val_tasks=[...])")
        return module

    def _gpus(self) -> list[str] | None:
        """``CUDA_VISIBLE_DEVICES`` of every explorer, where it can have GPUs of its own."""
        count = torch.cuda.device_count()
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = [str(index) for index in range(count)] if not named else named.split(",")[:count]
        root = self._trainer.strategy.root_device
        used = self._trainer.device_ids if root.type == "cuda" else []
        return gpus_for_explorers(visible, used, self.explorers, self.engine.world_size)

    @property
    def _threads(self) -> tuple[int, int]:
        """CPU threads of each explorer and of the trainer."""
        trains_on_cpu = self._trainer.strategy.root_device.type == "cpu"
        overlap = trains_on_cpu and self._fits and self._strategy.overlaps
        return share_cores(available_cpus(), self.explorers, overlap=overlap)

    def _check_interrupt(self) -> None:
        self.ranks.check()
        if self._trainer.received_sigterm:
            raise SIGTERMException  # Lightning only looks after a batch, and there may never be one

    def _end_run(self) -> None:
        self._restored = {}  # of a fit that ended before its run began
        if self._limit_val_batches is not None:
            self._trainer.limit_val_batches = self._limit_val_batches  # type: ignore[attr-defined]
            self._limit_val_batches = None
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None
        with ExitStack() as ends:
            if self._ledger is not None:
                ends.callback(self._ledger.close)
                if self._run is not None and self._explores_only:
                    ends.callback(self._tell_explored, self._ledger)
            if self._run is not None:
                ends.callback(self._run.close)
                if self._fits:
                    self._last = self.state_dict()
            self._run = self._ledger = None

    def _tell_explored(self, ledger: Ledger) -> None:
        """Says what there is to train on, and how; also of a run that was cut short."""
        counts, path = ledger.counts(), Path(self._path)
        rank_zero_info(
            f"Explored {counts[State.READY]} groups into {path}, {counts[State.FAILED]} tasks failed. The file holds "
            f"{len(stored_keys(path))} groups: to train on them, set explorers=0 and buffer={str(path)!r} in "
            "RFTDataModule or the config's data, and leave val_tasks and the sync strategy out"
        )

    def _stop(self) -> None:
        try:
            self._end_run()
        finally:
            self._pool.stop()


def _progress(saved: Mapping[str, Any], global_step: int) -> Progress:
    """Which groups are part of the weights that training goes on with."""
    if not saved:
        return Progress(global_step)
    if saved["version"] != global_step:
        raise ConfigurationError(
            f"ckpt_path was saved at global_step={global_step}, but with {saved['version']} batches trained: it was "
            "written in the middle of a step, or global_step was changed since. Use an earlier checkpoint"
        )
    behind, ahead = (frozenset(GroupKey(*key) for key in saved[name]) for name in ("behind", "ahead"))
    return Progress(global_step, behind, ahead)
