"""One run of the loop: it drives the schedule with what explorers, trainer and transport report.

A thread listens to the explorers. It and the trainer's thread share one lock; whatever the schedule answers is carried
out at once by whoever told it. An error on the listening thread reaches the trainer at its next call or wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning_rft.buffer.ledger import Ledger
from lightning_rft.errors import DeadlineError, ExplorerError
from lightning_rft.experience import Group, GroupKey, Task, TensorInfo
from lightning_rft.explorer.connection import Cancel, Explore, Explored, Failed, Loaded, Started
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.sync.schedule import Action, Issue, Lease, Publish, Schedule
from lightning_rft.tasks import TaskPlan

__all__ = ["Coordinator"]

_POLL_S = 0.2
_VALIDATION = -1  # the batch index of validation's groups, which no schedule knows


class Coordinator:
    """Connects schedule, explorers and buffer for the length of one ``fit`` or ``validate``.

    Args:
        schedule: Decides what is explored when.
        plan: Which task belongs where.
        pool: The explorers, started.
        ledger: The buffer.
        incarnation: Number of this run in the ledger; explorers' answers carry it.
        samples_per_task: Samples of a group.
        temperature: Softmax temperature of training samples.
        progress_timeout_s: Seconds without any news from the explorers after which a wait is given up.
        check_interrupt: Called during every wait; raises to end it.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        plan: TaskPlan,
        pool: ExplorerPool,
        ledger: Ledger,
        incarnation: int,
        samples_per_task: int,
        temperature: float,
        progress_timeout_s: float,
        check_interrupt: Callable[[], None],
    ) -> None:
        self._schedule = schedule
        self._plan = plan
        self._pool = pool
        self._ledger = ledger
        self._incarnation = incarnation
        self._samples_per_task = samples_per_task
        self._temperature = temperature
        self._progress_timeout_s = progress_timeout_s
        self._check_interrupt = check_interrupt
        self._news = threading.Condition(threading.RLock())
        self._last_news = time.monotonic()
        self._error: BaseException | None = None
        self._leased: list[Group] | None = None
        self._due = False
        self._loaded: dict[int, int] = {}
        self._validation: dict[int, Group | None] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="coordinator", daemon=True)

    def start(self) -> None:
        """Starts to listen."""
        for explorer in self._pool.members():  # those that an earlier run has started
            self._carry_out(self._schedule.joined(explorer))
        self._thread.start()

    def close(self) -> None:
        """Ends the run: explorers forget its work, what was leased and not trained goes back. Safe to call twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(10 * _POLL_S)
        with self._news:
            for explorer in self._pool.members():
                with contextlib.suppress(ExplorerError):  # one that is gone has nothing to forget
                    self._pool.send(explorer, Cancel(self._incarnation))
            if self._leased is not None:
                self._ledger.release(self.version)

    # What the loader asks

    def wanted(self, batch: int) -> list[Group]:
        """Waits for a batch and leases it.

        Raises:
            ScheduleError: It is not the batch that comes next.
            DeadlineError: Explorers sent no news for ``rollout_timeout_s``.
            Exception: Whatever failed in an explorer.
        """
        self._tell(lambda: self._schedule.wanted(batch))
        self._wait(lambda: self._leased is not None, f"batch {batch} of experience", "rollout_timeout_s")
        assert self._leased is not None
        return self._leased

    # What the strategy tells and asks

    @property
    def version(self) -> int:
        """Batches trained so far."""
        return self._schedule.version

    @property
    def published_version(self) -> int:
        """The version that was pushed last; -1 before the first push."""
        return self._schedule.published_version

    def trained(self, batch: int) -> None:
        """Tells that a batch is part of the weights."""
        with self._news:
            self._ledger.trained(batch)
            self._leased = None
        self._tell(lambda: self._schedule.trained(batch))

    def wait_due(self) -> bool:
        """Whether a push is due now, waiting first for what older weights must still explore."""
        if not self._schedule.push_pending:
            return False
        self._wait(lambda: self._due, "the groups that belong to the old weights", "rollout_timeout_s")
        self._due = False
        return True

    def published(self, version: int) -> None:
        """Tells that a version was pushed."""
        self._tell(lambda: self._schedule.published(version))

    # What the transport asks

    def members(self) -> dict[int, int]:
        """Explorer index -> number of processes inside it that hold weights."""
        return self._pool.members()

    @property
    def dtype(self) -> str:
        """Dtype of the engines' weights."""
        return self._pool.dtype

    @property
    def nccl(self) -> bool:
        """Whether every engine can receive by NCCL."""
        return self._pool.nccl

    def connect(self, explorer: int, link: Any) -> None:
        """Asks an explorer to join a weight transport."""
        self._pool.connect(explorer, link)

    def load(self, explorer: int, manifest: Sequence[TensorInfo], version: int) -> None:
        """Asks an explorer to receive a version."""
        self._loaded.pop(explorer, None)
        self._pool.load(explorer, manifest, version)

    def wait_ready(self) -> None:
        """Returns when every explorer's engine is up; the pool has the deadline."""
        self._wait(lambda: self._pool.ready, "the explorers to start", None)

    def wait_loaded(self, version: int, timeout_s: float) -> None:
        """Returns when every explorer computes with ``version``."""
        self._wait(
            lambda: all(self._loaded.get(explorer) == version for explorer in self._pool.members()),
            f"version {version} to be loaded",
            "CollectiveTransport(timeout_s=...)",
            timeout_s,
        )

    def raise_failures(self) -> None:
        """Raises what failed in an explorer, if anything did."""
        if self._error is not None:
            raise self._error

    # What validation asks

    def explore(self, tasks: Sequence[Task], *, samples: int, temperature: float) -> None:
        """Has tasks answered beside the schedule, with whatever version is loaded."""
        self.raise_failures()
        with self._news:
            self._validation = dict.fromkeys(range(len(tasks)))
            explorers = list(self._pool.members())
            for index, task in enumerate(tasks):
                key = GroupKey(_VALIDATION, index)
                seeds = tuple(range(samples))
                message = Explore(self._incarnation, key, task, seeds, temperature)
                self._pool.send(explorers[index % len(explorers)], message)

    def explored(self, index: int) -> Group:
        """Waits for the answers to one of the tasks of :meth:`explore`."""
        self._wait(lambda: self._validation[index] is not None, f"validation task {index}", "rollout_timeout_s")
        group = self._validation[index]
        assert group is not None
        return group

    # How

    def _tell(self, event: Callable[[], list[Action]]) -> None:
        self.raise_failures()
        with self._news:
            self._carry_out(event())

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Issue):
                key, task = action.group, self._plan.task(action.group)
                self._ledger.issue(key, task.id, self._plan.epoch(key.batch), action.explorer)
                seeds = tuple(self._plan.sample_seed(key, sample) for sample in range(self._samples_per_task))
                self._pool.send(action.explorer, Explore(self._incarnation, key, task, seeds, self._temperature))
            elif isinstance(action, Lease):
                self._leased = self._ledger.lease(action.batch)
            elif isinstance(action, Publish):
                self._due = True

    def _wait(self, done: Callable[[], bool], what: str, setting: str | None, timeout_s: float | None = None) -> None:
        """Waits until ``done``, for ``timeout_s`` in all or else as long as there is news from the explorers."""
        began = time.monotonic()
        with self._news:
            self._last_news = began  # an idle stretch before this wait is nobody's fault
            while not done():
                self.raise_failures()
                self._check_interrupt()
                self._news.wait(_POLL_S)
                waited = time.monotonic() - (self._last_news if timeout_s is None else began)
                limit = self._progress_timeout_s if timeout_s is None else timeout_s
                if setting is not None and waited > limit:
                    raise DeadlineError(
                        f"waited {waited:.0f} s for {what}: raise {setting}, now {limit:g}, or see the logs"
                    )
            self.raise_failures()

    def _listen(self) -> None:
        try:
            while not self._closing.is_set():
                for explorer, message in self._pool.poll(_POLL_S):
                    with self._news:
                        self._last_news = time.monotonic()
                        self._handle(explorer, message)
                        self._news.notify_all()
        except BaseException as error:
            with self._news:
                self._error = error
                self._news.notify_all()

    def _handle(self, explorer: int, message: Any) -> None:
        if isinstance(message, Started):
            self._carry_out(self._schedule.joined(explorer))
        elif isinstance(message, Loaded):
            self._loaded[explorer] = message.version
            self._carry_out(self._schedule.loaded(explorer, message.version))
        elif isinstance(message, Explored) and message.run == self._incarnation:
            group = Group(message.key, message.experiences[0].task_id, message.experiences)
            if message.key.batch == _VALIDATION:
                self._validation[message.key.slot] = group
            else:
                self._ledger.ready(group)
                self._carry_out(self._schedule.ready(message.key))
        elif isinstance(message, Failed) and message.run == self._incarnation:
            if message.key is not None and message.key.batch != _VALIDATION:
                self._ledger.failed(message.key, message.failure.text)
            raise message.failure.unpack(f"explorer {explorer}")
