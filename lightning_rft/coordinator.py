"""One run of the loop: it drives the schedule with what explorers, trainer and transport report.

A thread listens to the explorers. It and the trainer's thread share one lock; whatever the schedule answers is carried
out at once by whoever told it. An error on the listening thread reaches the trainer at its next call or wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_rft.buffer.ledger import Ledger
from lightning_rft.errors import DeadlineError, ExplorerError, ScheduleError
from lightning_rft.experience import Group, GroupKey, Task, TensorInfo
from lightning_rft.explorer.connection import Cancel, Explore, Explored, Failed, Loaded, Started
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.monitor.idle import Idle
from lightning_rft.monitor.spans import Span
from lightning_rft.sync.schedule import Action, Drop, Issue, Lease, Load, Publish, Schedule
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.tasks import TaskPlan

__all__ = ["Coordinator"]

_POLL_S = 0.2
_REFUSALS = 3  # of one group: by then it is not chance
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
        folder: The run's own folder.
        strategy: Loads weights where the schedule says so.
        observers: Called with every span of the timeline.
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
        folder: Path,
        strategy: SyncStrategy,
        observers: Sequence[Callable[[Span], None]],
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
        self.folder = folder
        self._strategy = strategy
        self._observers = observers
        self._news = threading.Condition(threading.RLock())
        self._last_news = time.monotonic()
        self._error: BaseException | None = None
        self._leased: list[Group] | None = None
        self._due = False
        self._loaded: dict[int, int] = {}
        self._attempts: Counter[GroupKey] = Counter()
        self._refusals: Counter[GroupKey] = Counter()
        self._asked: dict[GroupKey, tuple[int, float]] = {}  # what is explored: by whom, since when
        self._loading: dict[int, tuple[int, float]] = {}  # who loads which version, since when
        self._idle = Idle()
        self._dropped = 0
        self._validation: dict[int, Group | None] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="coordinator", daemon=True)

    def start(self) -> None:
        """Starts to listen."""
        for explorer in self._pool.members():  # those that an earlier run has started
            self._join(explorer)
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
                self._ledger.release()

    # What the loader asks

    def wanted(self, batch: int) -> list[Group]:
        """Waits for a batch and leases it.

        Raises:
            ScheduleError: It is not the batch that comes next.
            DeadlineError: Explorers sent no news for ``rollout_timeout_s``.
            Exception: Whatever failed in an explorer.
        """
        began = time.monotonic()
        self._tell(lambda: self._schedule.wanted(batch))
        while True:
            self._wait(lambda: self._leased is not None, f"batch {batch} of experience", "rollout_timeout_s")
            if not self._refuse_stale(batch):
                break
        self._idle.trainer("experience", time.monotonic() - began)
        self.observe("trainer", "wait", began, batch=batch, detail="experience")
        assert self._leased is not None
        return self._leased

    # What the strategy tells and asks

    @property
    def version(self) -> int:
        """Batches trained so far."""
        return self._schedule.version

    def trained(self, batch: int) -> None:
        """Tells that a batch is part of the weights."""
        with self._news:
            self._ledger.trained()
            self._leased = None
        self._tell(lambda: self._schedule.trained(batch))

    def wait_due(self) -> bool:
        """Whether a push is due now, waiting first for what older weights must still explore."""
        if self._schedule.push_pending:
            began = time.monotonic()
            self._wait(lambda: self._due, "the groups that belong to the old weights", "rollout_timeout_s")
            self._idle.trainer("push", time.monotonic() - began)
            self.observe("trainer", "wait", began, version=self.version, detail="push")
        with self._news:
            due, self._due = self._due, False
        return due

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
        with self._news:
            self._loaded.pop(explorer, None)
            self._loading[explorer] = version, time.monotonic()
            self._look()
        self._pool.load(explorer, manifest, version)

    def wait_ready(self) -> None:
        """Returns when every explorer's engine is up; the pool has the deadline."""
        self._wait(lambda: self._pool.ready, "the explorers to start", None)

    def wait_loaded(self, version: int, explorers: Sequence[int], timeout_s: float, setting: str) -> None:
        """Returns when each of ``explorers`` computes with ``version``."""
        self._wait(
            lambda: all(self._loaded.get(explorer) == version for explorer in explorers),
            f"version {version} to be loaded",
            setting,
            timeout_s,
        )

    def raise_failures(self) -> None:
        """Raises what failed in an explorer, if anything did."""
        if self._error is not None:
            raise self._error

    def failed(self, error: BaseException) -> None:
        """Ends every wait with what went wrong elsewhere; the first error counts."""
        with self._news:
            self._error = self._error or error
            self._news.notify_all()

    # What is told to whoever looks

    def observe(
        self,
        track: str,
        what: str,
        began: float,
        version: int | None = None,
        batch: int | None = None,
        detail: str = "",
    ) -> None:
        """Records what took from ``began`` (``time.monotonic()``) until now."""
        if self._observers:
            span = Span(track, what, began, time.monotonic(), batch=batch, version=version, detail=detail)
            for observer in self._observers:
                observer(span)

    def metrics(self) -> dict[str, float]:
        """What explorers did since the last call, in seconds (their mean), and how many groups were dropped so far."""
        with self._news:
            self._look()
            return self._idle.metrics() | {"rft/dropped_groups": float(self._dropped)}

    def summary(self) -> str:
        """One line about who waited for whom, and what to change."""
        with self._news:
            self._look()
            return self._idle.summary()

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
                message = Explore(self._incarnation, key, 0, task, seeds, temperature)
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
                self._issue(action.group, action.explorer)
            elif isinstance(action, Lease):
                self._leased = self._ledger.lease(action.groups)
            elif isinstance(action, Publish):
                self._due = True
            elif isinstance(action, Load):
                self._strategy.load(action.explorer)
            elif isinstance(action, Drop):
                self._drop(action.group, action.explorer)
        self._look()

    def _join(self, explorer: int) -> None:
        room = max(1, self._pool.max_num_seqs(explorer) // self._samples_per_task)
        self._carry_out(self._schedule.joined(explorer, room))

    def _issue(self, key: GroupKey, explorer: int) -> None:
        task = self._plan.task(key)
        self._ledger.issue(key, task.id, self._plan.epoch(key.batch), explorer)
        seeds = tuple(self._plan.sample_seed(key, sample) for sample in range(self._samples_per_task))
        self._attempts[key] += 1
        self._asked[key] = explorer, time.monotonic()
        message = Explore(self._incarnation, key, self._attempts[key], task, seeds, self._temperature)
        self._pool.send(explorer, message)

    def _drop(self, key: GroupKey, explorer: int | None) -> None:
        self._dropped += 1
        self._ledger.dropped(key)
        if explorer is not None:
            self._attempts[key] += 1  # an answer that is on its way is too late
            self._asked.pop(key)
            self._pool.send(explorer, Cancel(self._incarnation, key))

    def _refuse_stale(self, batch: int) -> bool:
        """Sends back what is too old to be trained, whatever the schedule believes; whether there was any."""
        with self._news:
            assert self._leased is not None
            bound = self._strategy.max_staleness
            stale = [group for group in self._leased if batch - group.oldest_version > bound]
            if not stale:
                return False
            self._leased = None
            for group in stale:
                self._refusals[group.key] += 1
                if self._refusals[group.key] > _REFUSALS:
                    raise ScheduleError(
                        f"task {group.task_id!r} came back with tokens of version {group.oldest_version} for batch "
                        f"{batch} again and again, but the strategy allows a staleness of {bound}: its explorer does "
                        "not compute with the weights that it says it loaded"
                    )
                self._drop(group.key, None)
            self._ledger.release()
        self._tell(lambda: self._schedule.refused([group.key for group in stale]))
        return True

    def _look(self) -> None:
        """Notes what every explorer is at, since that may just have changed."""
        now = time.monotonic()
        for explorer in self._schedule.explorers:
            state = "load" if explorer in self._loading else self._schedule.waits_for(explorer) or "explore"
            ended = self._idle.explorer(explorer, state, now)
            if ended is not None and ended[0] in ("weights", "room"):
                self.observe(f"explorer {explorer}", "wait", ended[1], detail=ended[0])

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
        now = time.monotonic()
        track = f"explorer {explorer}"
        if isinstance(message, Started):
            self._join(explorer)
        elif isinstance(message, Loaded):
            self._loaded[explorer] = message.version
            _, began = self._loading.pop(explorer)
            self.observe(track, "load checkpoint" if self._by_checkpoint else "load", began, message.version)
            self._carry_out(self._schedule.loaded(explorer, message.version))
        elif isinstance(message, Explored) and message.run == self._incarnation:
            group = Group(message.key, message.experiences[0].task_id, message.experiences)
            if message.key.batch == _VALIDATION:
                self._validation[message.key.slot] = group
            elif message.attempt == self._attempts[message.key]:
                _, began = self._asked.pop(message.key)
                self.observe(track, "rollout", began, group.oldest_version, message.key.batch)
                self._ledger.ready(group)
                self.observe("buffer", "put", now, group.oldest_version, message.key.batch)
                self._carry_out(self._schedule.ready(message.key, group.oldest_version))
        elif isinstance(message, Failed) and message.run == self._incarnation:
            if message.key is None or message.key.batch == _VALIDATION:
                raise message.failure.unpack(track)
            if message.attempt == self._attempts[message.key]:
                self._ledger.failed(message.key, message.failure.text)
                raise message.failure.unpack(track)

    @property
    def _by_checkpoint(self) -> bool:
        return self._strategy.transport.kind == "checkpoint"
