"""One run of the loop: it drives the schedule with what explorers, trainer and transport report.

A thread listens to the explorers. It and the trainer's thread share one lock; whatever the schedule answers is carried
out at once by whoever told it. An error on the listening thread reaches the trainer at its next call or wait. What an
explorer that died, or hung and was ended, had been asked for is asked of another.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_rft.buffer.filters import Filter
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.buffer.policies import ReplayMemory
from lightning_rft.errors import DeadlineError, LinkError, ScheduleError
from lightning_rft.experience import Group, GroupKey, Task, TensorInfo
from lightning_rft.explorer.connection import (
    Advanced,
    Cancel,
    Explore,
    Explored,
    Loaded,
    LoadFailed,
    Started,
)
from lightning_rft.explorer.pool import Died, ExplorerPool
from lightning_rft.explorer.tolerance import Tolerance
from lightning_rft.explorer.watch import Watch
from lightning_rft.monitor.idle import Idle
from lightning_rft.monitor.spans import Span
from lightning_rft.quiz import Quiz
from lightning_rft.resume import run_state
from lightning_rft.sync.schedule import Action, Drop, Issue, Lease, Load, Publish, Schedule
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.tasks import TaskCursor

__all__ = ["Coordinator"]

_log = logging.getLogger(__name__)

_POLL_S = 0.2
_GRACE_S = 30.0  # for a hung explorer to be ended before its silence ends a wait
_REFUSALS = 3  # of one group: by then it is not chance
_DEATHS = 2  # of explorers with the same group: it may be what kills them


class Coordinator:
    """Connects schedule, explorers and buffer for the length of one ``fit``, ``validate`` or ``predict``.

    Args:
        schedule: Decides what is explored when.
        cursor: Which task belongs where.
        pool: The explorers, started.
        ledger: The buffer.
        incarnation: Number of this run in the ledger; explorers' answers carry it.
        samples_per_task: Samples of a group.
        min_samples: With fewer that succeeded, a group has failed, and another task takes its place.
        tolerance: How many samples may fail.
        temperature: Softmax temperature of training samples.
        progress_timeout_s: Seconds without progress after which an explorer that has work is ended.
        check_interrupt: Called during every wait; raises to end it.
        group_filter: Says which groups are not to be trained: another task takes the place of each.
        score: Says what is to be trained first, where the strategy leaves a choice; ``None`` for the oldest.
        replay: Says what comes along with a batch.
        folder: The run's own folder.
        strategy: Loads weights where the schedule says so.
        observers: Called with every span of the timeline.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        cursor: TaskCursor,
        pool: ExplorerPool,
        ledger: Ledger,
        incarnation: int,
        samples_per_task: int,
        min_samples: int,
        tolerance: Tolerance,
        temperature: float,
        progress_timeout_s: float,
        check_interrupt: Callable[[], None],
        group_filter: Filter,
        score: Callable[[Group], float] | None,
        replay: ReplayMemory,
        folder: Path,
        strategy: SyncStrategy,
        observers: Sequence[Callable[[Span], None]],
    ) -> None:
        self._schedule = schedule
        self._cursor = cursor
        self._pool = pool
        self._ledger = ledger
        self._incarnation = incarnation
        self._samples_per_task = samples_per_task
        self._min_samples = min_samples
        self._tolerance = tolerance
        self._temperature = temperature
        self._check_interrupt = check_interrupt
        self._filter = group_filter
        self._score = score
        self._replay = replay
        self.folder = folder
        self._strategy = strategy
        self._observers = observers
        self._news = threading.Condition(threading.RLock())
        self._last_news = time.monotonic()
        self._error: BaseException | None = None
        self._leased: list[Group] | None = None
        self._due = False
        self._loaded: dict[int, int] = {}
        self._broken: set[int] = set()  # whose last load broke off
        self._late: set[int] = set()  # who came up between two pushes of a strategy that waits for them
        self._served: set[int] = set()  # of those, to whom the trainer is bringing them
        self._watch = Watch(progress_timeout_s)
        self._deaths: Counter[GroupKey] = Counter()
        self._dropped = self._failed = 0
        self._restarts = pool.restarts
        self._attempts: Counter[GroupKey] = Counter()
        self._refusals: Counter[GroupKey] = Counter()
        self._asked: dict[GroupKey, tuple[int, float]] = {}  # what is explored: by whom, since when
        self._loading: dict[int, tuple[int, float]] = {}  # who loads which version, since when
        self._idle = Idle()
        self._quiz = Quiz((), run=incarnation, samples=0, temperature=0.0)
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
            self._thread.join(_GRACE_S)  # before the pool is stopped: it might just be starting an explorer again
        with self._news:
            for explorer in self._pool.members():
                self._pool.send(explorer, Cancel(self._incarnation))
            if self._leased is not None:
                self._ledger.release()

    # What the loader asks

    def wanted(self, batch: int) -> list[Group]:
        """Waits for a batch and leases it; returns it, and what is replayed along with it.

        Raises:
            ScheduleError: It is not the batch that comes next.
            DeadlineError: Explorers sent no news for ``rollout_timeout_s``.
            Exception: Whatever failed in an explorer.
        """
        began = time.monotonic()
        self._tell(lambda: self._schedule.wanted(batch))
        while True:
            self._wait_served(lambda: self._leased is not None, f"batch {batch} of experience")
            if not self._refuse_stale(batch):
                break
        self._idle.trainer("experience", time.monotonic() - began)
        self.observe("trainer", "wait", began, batch=batch, detail="experience")
        assert self._leased is not None
        return [*self._leased, *self._replay.chosen(batch)]

    def kept(self, index: int) -> tuple[int, list[Group]]:
        """Waits for a batch that nobody will train in this run: it stays in the buffer, ready.

        Args:
            index: Counts the batches of this run.

        Returns:
            The batch's number, and its groups.

        Raises:
            DeadlineError: Explorers sent no news for ``rollout_timeout_s``.
            Exception: Whatever failed in an explorer.
        """
        self.raise_failures()
        batch = self._schedule.version + index  # nothing is trained, so the version stays
        self._wait_served(lambda: self._schedule.is_ready(batch), f"batch {batch} of experience")
        keys = [GroupKey(batch, slot) for slot in range(self._cursor.plan.size(batch))]
        with self._news:
            return batch, list(self._ledger.read(keys))

    # What the strategy tells and asks

    @property
    def version(self) -> int:
        """Batches trained so far."""
        return self._schedule.version

    def trained(self, batch: int) -> None:
        """Tells that a batch is part of the weights."""
        with self._news:
            assert self._leased is not None
            self._ledger.trained(batch)
            for group in self._leased:
                self._cursor.done(group.key)
            self._replay.trained(batch, self._leased)
            self._leased = None
        self._tell(lambda: self._schedule.trained(batch))

    def wait_due(self) -> bool:
        """Whether a push is due now, waiting first for what older weights must still explore."""
        if self._schedule.push_pending:
            began = time.monotonic()
            self._wait_served(lambda: self._due, "the groups that belong to the old weights")
            self._idle.trainer("push", time.monotonic() - began)
            self.observe("trainer", "wait", began, version=self.version, detail="push")
        with self._news:
            due, self._due = self._due, False
        return due

    def published(self, version: int) -> None:
        """Tells that a version was pushed."""
        self._tell(lambda: self._schedule.published(version))

    def late(self, explorer: int) -> None:
        """Notes that an explorer needs weights before the next push: the trainer brings them when it waits."""
        self._late.add(explorer)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, for a checkpoint: plain values."""
        with self._news:
            return run_state(self._schedule.progress, self._cursor, self._ledger, self._incarnation)

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
            now = time.monotonic()
            self._loaded.pop(explorer, None)
            self._broken.discard(explorer)
            if explorer in self._pool.members():
                self._loading[explorer] = version, now
                self._watch.asked(explorer, now)
            self._look()
        self._pool.load(explorer, manifest, version)

    def wait_ready(self) -> None:
        """Returns when every explorer's engine is up; the pool has the deadline."""
        self._wait(lambda: self._pool.ready, "the explorers to start")

    def wait_loaded(self, version: int, explorers: Sequence[int], timeout_s: float, setting: str) -> None:
        """Returns when each of ``explorers`` that is alive computes with ``version``; see ``Explorers``."""

        def missing() -> list[int]:
            members = self._pool.members()
            return [index for index in explorers if index in members and self._loaded.get(index) != version]

        def broken() -> list[int]:
            return [index for index in missing() if index in self._broken]

        deadline = time.monotonic() + timeout_s
        what = f"version {version} to be loaded"
        self._wait(lambda: not missing() or bool(broken()) or time.monotonic() > deadline, what)
        if broken():
            raise LinkError(f"the weight transport broke off for explorers {broken()}")
        self.end(missing(), f"did not load version {version} in time: raise {setting}, or see its log")

    def end(self, explorers: Sequence[int], blame: str) -> None:
        """Ends explorers that are of no use; others are started for them. Returns when they are gone."""
        for explorer in explorers:
            self._pool.kill(explorer, blame)
        self._wait(lambda: not self._pool.members().keys() & set(explorers), "explorers to end", _GRACE_S)

    def settle(self, explorers: Sequence[int], timeout_s: float) -> None:
        """Returns when none of ``explorers`` is in the middle of a load; one that is stuck in it is ended."""

        def stuck() -> list[int]:
            return [index for index in explorers if index in self._loading]

        deadline = time.monotonic() + timeout_s
        self._wait(lambda: not stuck() or time.monotonic() > deadline, "loads that broke off")
        self.end(stuck(), "was stuck in a load that broke off")

    def raise_failures(self) -> None:
        """Raises what ends the run, if something does."""
        if self._error is not None:
            raise self._error
        self._check_interrupt()

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
        """What explorers did since the last call, in seconds (their mean), and what went wrong so far."""
        with self._news:
            self._look()
            return self._idle.metrics() | {
                "rft/dropped_groups": float(self._dropped),
                "rft/failed_groups": float(self._failed),
                "rft/filtered_groups": float(self._filter.refused),
                "rft/replayed_groups": float(self._replay.replayed),
                "rft/failed_samples": float(self._tolerance.failed),
                "rft/retried_samples": float(self._tolerance.retried),
                "rft/explorer_restarts": float(self._pool.restarts - self._restarts),
            }

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
            self._quiz = Quiz(tasks, run=self._incarnation, samples=samples, temperature=temperature)
            self._ask()

    def explored(self, index: int) -> Group:
        """Waits for the answers to one of the tasks of :meth:`explore`; without those that failed after every retry."""
        self._wait_served(lambda: index in self._quiz.answers, f"validation task {index}")
        return self._quiz.answers[index]

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
        task = self._cursor.task(key)
        self._ledger.issue(key, task.id, self._cursor.epoch(key), explorer)
        seeds = tuple(self._cursor.sample_seed(key, sample) for sample in range(self._samples_per_task))
        self._attempts[key] += 1
        self._asked[key] = explorer, time.monotonic()
        self._watch.asked(explorer, time.monotonic())
        message = Explore(self._incarnation, key, self._attempts[key], task, seeds, self._temperature)
        self._pool.send(explorer, message)

    def _drop(self, key: GroupKey, explorer: int | None) -> None:
        self._dropped += 1
        self._ledger.dropped(key)
        if explorer is not None:
            self._attempts[key] += 1  # an answer that is on its way is too late
            self._asked.pop(key)
            self._watch.answered(explorer, time.monotonic())
            self._pool.send(explorer, Cancel(self._incarnation, key))

    def _refuse_stale(self, batch: int) -> bool:
        """Sends back what is too old to be trained, whatever the schedule believes; whether there was any."""
        with self._news:
            assert self._leased is not None
            stale = [group for group in self._leased if self._is_stale(group, batch)]
            if not stale:
                return False
            self._leased = None
            for group in stale:
                self._refuse(group, batch)
            self._ledger.release()
        self._tell(lambda: self._schedule.refused([group.key for group in stale]))
        return True

    def _is_stale(self, group: Group, batch: int) -> bool:
        return batch - group.oldest_version > self._strategy.max_staleness

    def _refuse(self, group: Group, batch: int) -> None:
        self._refusals[group.key] += 1
        if self._refusals[group.key] > _REFUSALS:
            raise ScheduleError(
                f"task {group.task_id!r} came back with tokens of version {group.oldest_version} for batch {batch} "
                f"again and again, but the strategy allows a staleness of {self._strategy.max_staleness}: its explorer "
                "does not compute with the weights that it says it loaded"
            )
        self._drop(group.key, None)

    def _look(self) -> None:
        """Notes what every explorer is at, since that may just have changed."""
        now = time.monotonic()
        for explorer in self._schedule.explorers:
            state = "load" if explorer in self._loading else self._schedule.waits_for(explorer) or "explore"
            ended = self._idle.explorer(explorer, state, now)
            if ended is not None and ended[0] in ("weights", "room"):
                self.observe(f"explorer {explorer}", "wait", ended[1], detail=ended[0])

    def _wait_served(self, done: Callable[[], bool], what: str) -> None:
        """Waits on the trainer's thread, as long as explorers come further; brings weights to those that come up."""
        self._last_news = time.monotonic()  # an idle stretch before this wait is nobody's fault
        limit = self._watch.timeout_s + _GRACE_S
        while True:
            with self._news:
                late, self._late = self._late & self._pool.members().keys(), set()
            if late:
                self._served = late
                self._strategy.bring(sorted(late))
                self._served = set()
            self._wait(lambda: done() or bool(self._late) or time.monotonic() - self._last_news > limit, what)
            if done():
                return
            if not self._late:
                raise DeadlineError(
                    f"waited {time.monotonic() - self._last_news:.0f} s for {what} without any news from the "
                    f"explorers: raise rollout_timeout_s, now {self._watch.timeout_s:g}, or see their logs"
                )

    def _wait(self, done: Callable[[], bool], what: str, timeout_s: float | None = None) -> None:
        """Waits until ``done``, which itself sees to it that this happens in time unless ``timeout_s`` is given."""
        began = time.monotonic()
        with self._news:
            while not done():
                self.raise_failures()
                self._news.wait(_POLL_S)
                if timeout_s is not None and time.monotonic() - began > timeout_s:
                    raise DeadlineError(f"waited {timeout_s:.0f} s for {what}: see the explorers' logs")
            self.raise_failures()

    def _listen(self) -> None:
        try:
            while not self._closing.is_set():
                messages = self._pool.poll(_POLL_S)
                now = time.monotonic()
                with self._news:
                    for explorer, message in messages:
                        self._handle(explorer, message)
                    if messages or self._pool.starting:
                        self._last_news = now
                        self._news.notify_all()
                    hung = self._watch.overdue(now)
                for explorer in hung:
                    self._pool.kill(
                        explorer,
                        f"had work but made no progress for rollout_timeout_s={self._watch.timeout_s:g} seconds",
                    )
        except BaseException as error:
            self.failed(error)

    def _handle(self, explorer: int, message: Any) -> None:
        now = time.monotonic()
        if isinstance(message, Started):
            self._join(explorer)
        elif isinstance(message, Died):
            self._lost(explorer, message.error)
        elif isinstance(message, Advanced):
            self._watch.advanced(explorer, now)
        elif isinstance(message, Loaded):
            self._watch.answered(explorer, now)
            self._loaded[explorer] = message.version
            _, began = self._loading.pop(explorer)
            what = "load checkpoint" if self._strategy.transport.kind == "checkpoint" else "load"
            self.observe(f"explorer {explorer}", what, began, message.version)
            self._late.discard(explorer)
            self._carry_out(self._schedule.loaded(explorer, message.version, alone=explorer in self._served))
            self._ask()
        elif isinstance(message, LoadFailed):
            self._watch.answered(explorer, now)
            self._loading.pop(explorer)
            self._broken.add(explorer)
        elif isinstance(message, Explored) and message.run == self._incarnation:
            self._explored(explorer, message)

    def _explored(self, explorer: int, message: Explored) -> None:
        now, key = time.monotonic(), message.key
        of_schedule = not Quiz.owns(message)
        if of_schedule and message.attempt != self._attempts[key]:
            return  # given up meanwhile
        self._watch.answered(explorer, now)
        self._tolerance.take(message, f"explorer {explorer}")
        if not of_schedule:
            self._quiz.answered(message)
            return
        group = Group(key, message.task_id, message.experiences)
        version = group.oldest_version if group.experiences else None
        _, began = self._asked.pop(key)
        self.observe(f"explorer {explorer}", "rollout", began, version, key.batch)
        if len(group.experiences) < self._min_samples:
            self._fail(key, message.failures[0].text)
            self._carry_out(self._schedule.failed(key))
        elif self._is_stale(group, self._schedule.version):
            self._refuse(group, self._schedule.version)
            self._carry_out(self._schedule.failed(key))
        elif self._filter.refuses(group):
            self._deaths.pop(key, None)
            self._ledger.filtered(key, step=self._schedule.version)
            self._cursor.replace(key)
            self._carry_out(self._schedule.failed(key))
        else:
            self._deaths.pop(key, None)
            score = 0.0 if self._score is None else self._score(group)
            self._ledger.ready(group)
            self.observe("buffer", "put", now, version, key.batch)
            self._carry_out(self._schedule.ready(key, version, score))

    def _ask(self) -> None:
        able = [explorer for explorer in self._pool.members() if explorer in self._loaded]
        self._quiz.ask(able, self._pool, self._watch)

    def _fail(self, key: GroupKey, why: str) -> None:
        """Ends a group's task as failed; the next task takes its place in the batch."""
        self._failed += 1
        self._deaths.pop(key, None)
        _log.warning("task %r failed and is replaced: %s", self._cursor.task(key).id, why.strip().splitlines()[-1])
        self._ledger.failed(key, why, step=self._schedule.version)
        self._cursor.replace(key)

    def _lost(self, explorer: int, error: Exception) -> None:
        """Has others do what an explorer that died was at."""
        _log.warning("another explorer is started, since %s", error)
        self._watch.gone(explorer)
        self._idle.gone(explorer, time.monotonic())
        self._loading.pop(explorer, None)
        self._loaded.pop(explorer, None)
        self._late.discard(explorer)
        for key in [key for key, (who, _) in self._asked.items() if who == explorer]:
            del self._asked[key]
            self._deaths[key] += 1
            if self._deaths[key] >= _DEATHS:
                self._fail(key, f"{_DEATHS} explorers died with it, the last: {error}")
        self._quiz.gone(explorer)
        if explorer in self._schedule.explorers:
            self._carry_out(self._schedule.died(explorer))
        self._ask()
