"""The datamodule: where tasks, explorers, buffer and loader meet, and the owner of all that is started."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from typing_extensions import override

from lightning_rft.buffer.reader import StoredExperience
from lightning_rft.errors import ConfigurationError, DeadlineError
from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.explorer.engines.vllm import VLLMEngine
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.spec import ExplorerSpec, fitting_length
from lightning_rft.explorer.workflows.policy import Workflow
from lightning_rft.explorer.workflows.single_turn import SingleTurn
from lightning_rft.model_folder import Pretrained
from lightning_rft.monitor.spans import Span
from lightning_rft.monitor.status import StatusLine
from lightning_rft.renamed import refuses_old_names
from lightning_rft.reward_calls import RewardSum
from lightning_rft.rewards import check_answers
from lightning_rft.run.checks import check_counts, check_source, check_together, check_unwrapped
from lightning_rft.run.lifecycle import RunSettings
from lightning_rft.run.nodes import check_nodes
from lightning_rft.run.session import Session
from lightning_rft.run.validation import validation_loaders, validation_sampling
from lightning_rft.settings import Buffer, Sampling, Timeouts, Tolerance
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.tasks.held_out import HeldOut, read_sets
from lightning_rft.tasks.mixture import Mixture
from lightning_rft.tasks.plan import TaskPlan
from lightning_rft.tasks.source import epoch_tasks, first, known
from lightning_rft.tasks.sources import Tasks
from lightning_rft.tasks.task_set import TaskSet
from lightning_rft.trainer.limits import EpochProgress, micro_batches
from lightning_rft.trainer.loader import ExperienceLoader, ExplorationLoader, ValidationLoader
from lightning_rft.trainer.module import RFTModule

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
        tasks: Tasks to train on: :class:`Task` objects, dictionaries, plain prompts, a table, a file, a folder, a name
            on the hub, a :class:`TaskSet` of any of these, or a :class:`Mixture`.
        reward: ``reward(completion, task)``, any callable, plain or ``async``, that returns a finite number, or several
            by name, whose sum it is; a :class:`RewardSum`; or ``reward(completions, tasks)`` for all samples of a task
            together. None: the workflow's :class:`Answer` says what a sample earned.
        engine: What samples; left out, :class:`VLLMEngine`.
        explorers: Number of explorer processes, each with an engine of its own; 0 trains from ``buffer`` alone; or an
            :class:`ExplorerPool`, which is then this data module's to end.
        workflow: ``workflow(task, policy)``, ``async``, that returns the text to score or an :class:`Answer`; left out,
            :class:`SingleTurn`.
        tasks_per_step: Groups of one batch, which is one optimizer step.
        samples_per_task: Samples of one group.
        max_new_tokens: Maximum tokens per answer, short for ``sampling=Sampling(max_new_tokens=...)``; left out, 256.
        val_tasks: Held-out tasks, for validation; a mapping of such by name makes sets with metrics of their own
            (``{"easy": tasks, "hard": "hard.jsonl"}``).
        sampling: How training samples.
        val_sampling: How validation samples; what it leaves out is as in training, but a single answer is greedy.
        val_samples: Samples of each held-out task. Two or more also measure ``val/pass_at_k`` and the majority.
        tolerance: How many samples may fail.
        timeouts: How long rewards, samples and the start of an engine may take, and how long an explorer may hang.
        buffer: Where experience is kept, and which groups are trained; a path, or ``":memory:"``, is short for
            ``Buffer(path)``.

    Raises:
        ConfigurationError: A setting cannot work, or has moved; the message names it.
    """

    @refuses_old_names
    def __init__(
        self,
        tasks: TaskSet | Mixture | Tasks = (),
        reward: RewardSum | Callable[..., Any] | None = None,  # the class by name, for its short one in a config
        engine: Engine | None = None,
        explorers: int | ExplorerPool = 1,
        workflow: Workflow | None = None,
        tasks_per_step: int = 8,
        samples_per_task: int = 8,
        max_new_tokens: int | None = None,
        val_tasks: HeldOut | None = None,
        sampling: Sampling = Sampling(),
        val_sampling: Sampling = Sampling(),
        val_samples: int = 1,
        tolerance: Tolerance = Tolerance(),
        timeouts: Timeouts = Timeouts(),
        buffer: Buffer | str | Path | None = None,
    ) -> None:
        super().__init__()
        self.sampling = sampling.for_training(max_new_tokens)
        self.val_sampling = validation_sampling(val_sampling, self.sampling, val_samples)
        self.val_samples = val_samples
        self.tolerance = tolerance
        self.timeouts = timeouts
        self.buffer = buffer if isinstance(buffer, Buffer) else Buffer(buffer)
        self.task_set = tasks if isinstance(tasks, TaskSet | Mixture) else TaskSet(tasks)
        check_counts(
            tasks_per_step=tasks_per_step,
            samples_per_task=samples_per_task,
            sampling=self.sampling,
            tolerance=self.tolerance,
            buffer=self.buffer,
        )
        check_source(reward, workflow, self.buffer, explores=explorers != 0, validates=val_tasks is not None)
        self.tasks_per_step = tasks_per_step
        self.samples_per_task = samples_per_task
        self.tasks = [] if explorers == 0 else self.task_set.read()
        #: Held-out tasks by the name of their set; a single set has the empty one.
        self.val_sets = read_sets(val_tasks)
        self.val_tasks = list(chain(*self.val_sets.values()))
        check_answers(reward, chain(first(self.tasks), self.val_tasks))
        self.reward = reward
        if isinstance(explorers, ExplorerPool):
            if engine is not None and engine is not explorers.engine:
                raise ConfigurationError("engine=... and explorers=ExplorerPool(...): give the engine to the pool only")
            self._pool = explorers
        else:
            self._pool = ExplorerPool(engine or VLLMEngine(), explorers or 1)
        self.engine = self._pool.engine
        self.explorers = explorers if isinstance(explorers, int) else explorers.count
        self.workflow = workflow or SingleTurn()
        self._stored = self._stored_experience() if explorers == 0 else None
        self.steps_per_epoch = (
            self._stored.batches
            if self._stored is not None
            else self.task_set.steps_per_epoch or TaskPlan.batches(epoch_tasks(self.tasks), tasks_per_step)
        )
        #: Called with every :class:`~lightning_rft.monitor.timeline.Span` of a run.
        self.observers: list[Callable[[Span], None]] = []
        self._session: Session | None = None  # from setup to teardown
        self._held = False
        self._restored: dict[str, Any] = {}  # from a checkpoint, until the run that resumes it begins
        self._last: dict[str, Any] = {}  # for a checkpoint that is saved after the run

    # What is started here is stopped here, on every path

    def __enter__(self) -> Self:
        self._held = True
        return self

    def __exit__(self, *_: object) -> None:
        self._held = False
        self._stop()

    @override
    def setup(self, stage: str) -> None:
        module = check_together(
            self._trainer,
            explorers=self.explorers,
            buffer=self.buffer,
            samples_per_task=self.samples_per_task,
            validates=bool(self.val_tasks),
        )
        if self._session is not None:  # of a call that Lightning did not end
            self._session.ranks.close()
        self._session = Session(self._trainer, validates=bool(self.val_tasks))
        check_nodes(self._session.ranks, self._trainer, self._pool if self.explorers else None)
        self._session.ranks.agree("setup", lambda: self._start_explorers(module))

    def _start_explorers(self, module: RFTModule) -> None:
        if self._stored is None and not self._pool.assigned:
            with StatusLine(self._trainer) as status:
                several = "s" if self.explorers > 1 else ""
                status.say(f"starting {self.explorers} explorer{several} ({type(self.engine).__name__})")
                self._active.start(self._pool, self._spec(module.pretrained))

    def _spec(self, model: Pretrained) -> ExplorerSpec:
        """What every explorer runs, once it is certain that it can."""
        model = model.other(self.engine.model)  # the trainer's, unless the engine names another
        model.check()
        self.engine.check()
        sampled = [self.sampling, self.val_sampling] if self.val_tasks else [self.sampling]
        for sampling in sampled:
            self.engine.check_sampling(sampling)
        return ExplorerSpec(
            engine=self.engine,
            model=model,
            workflow=self.workflow,
            reward=self.reward,
            max_model_len=fitting_length(
                model,
                known(self.tasks, self.val_tasks),
                max_new_tokens=max(sampling.max_new_tokens or 0 for sampling in sampled),
                max_model_len=self.engine.max_model_len,
                single_turn=isinstance(self.workflow, SingleTurn),
                template=self.sampling.chat_template_kwargs,
            ),
            seed=self.sampling.seed or 0,
            tolerance=self.tolerance,
            timeouts=self.timeouts,
        )

    # What a strategy tells of

    def begin(self, strategy: SyncStrategy) -> None:
        """Begins the run of this call of the trainer, once, and pushes the first version."""
        session = self._active
        if session.begun:
            return
        check_unwrapped(self._trainer.lightning_module)  # which an overridden configure_model may have wrapped
        saved, self._restored = self._restored if session.fits else {}, {}
        self._last = {} if session.fits else self._last
        settings = RunSettings(
            tasks=self.tasks,
            steps_per_epoch=self.steps_per_epoch,
            shuffle=self.task_set.shuffle and not self._overfits,
            goes_on=self.task_set.goes_on and not self._overfits,
            tasks_per_step=self.tasks_per_step,
            samples_per_task=self.samples_per_task,
            sampling=self.sampling,
            tolerance=self.tolerance,
            timeouts=self.timeouts,
            buffer=self.buffer,
        )
        session.begin(strategy, self._pool, settings, saved, self.observers)

    def trained(self, batch: int) -> dict[str, float]:
        """Takes in that a batch was trained, and pushes the weights if that is due; returns what is to be logged."""
        return self._active.trained(batch)

    def finish(self) -> None:
        """Pushes the last version, if it was not, so that what is sampled next is sampled with it."""
        self._active.finish()

    # What a checkpoint holds

    @override
    def state_dict(self) -> dict[str, Any]:
        return (self._session.state_dict() if self._session else {}) or self._last

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def teardown(self, stage: str) -> None:
        self._stop(keep_explorers=self._held)

    @override
    def on_exception(self, exception: BaseException) -> None:
        # after an exception Lightning calls no teardown
        if self._session is not None:
            self._session.fail(exception)
        with contextlib.suppress(DeadlineError):  # of a push in the background: the exception says more
            self._stop()

    # What Lightning iterates over

    @override
    def train_dataloader(self) -> ExperienceLoader:
        session, stored, accumulate = self._active, self._stored, self._trainer.accumulate_grad_batches
        session.ranks.mind_sigterm()
        items = micro_batches(self._trainer, self.steps_per_epoch)
        if stored is not None:
            stored.repeated = -(-items // accumulate) if self._overfits else None
        return ExperienceLoader(
            lambda: session.coordinator if stored is None else stored,
            session.ranks,
            batches=self.steps_per_epoch,
            accumulate=accumulate,
            items=items,
            max_new_tokens=self.sampling.max_new_tokens or 1,
            progress=EpochProgress(self._trainer),
        )

    @override
    def val_dataloader(self) -> list[ValidationLoader]:
        session = self._active
        session.ranks.mind_sigterm()  # Lightning asks for loaders as soon as its own handler is there
        return validation_loaders(
            self.val_sets,
            session,
            self._trainer,
            samples=self.val_samples,
            sampling=self.val_sampling,
            chunk=self.tasks_per_step * self.samples_per_task,
        )

    @override
    def test_dataloader(self) -> list[ValidationLoader]:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> ExplorationLoader:
        session = self._active
        session.ranks.mind_sigterm()
        return ExplorationLoader(lambda index: session.coordinator.kept(index), session.ranks, self.steps_per_epoch)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # the training step makes its tensors on the device

    def _stored_experience(self) -> StoredExperience:
        return StoredExperience(
            str(self.buffer.path),
            tasks_per_step=self.tasks_per_step,
            shuffle=self.buffer.shuffle,
            seed=self.sampling.seed or 0,
            version=lambda: self._trainer.global_step,
        )

    # How

    @property
    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None, "the datamodule is not attached to a trainer"
        return self.trainer

    @property
    def _active(self) -> Session:
        assert self._session is not None, "setup has not run"
        return self._session

    @property
    def _overfits(self) -> bool:
        return self._trainer.overfit_batches > 0  # type: ignore[attr-defined, no-any-return]

    def _stop(self, *, keep_explorers: bool = False) -> None:
        session, self._session = self._session, None
        self._restored = {}  # of a fit that ended before its run began
        with contextlib.ExitStack() as ends:
            if session is not None:
                ends.callback(session.ranks.close)
            if not keep_explorers:
                ends.callback(self._pool.stop)
            if session is not None:
                self._last = session.end() or self._last
