"""One run of the loop: it drives the schedule with what explorers, trainer and transport report.

A thread listens to the explorers. It and the trainer's thread share one lock; whatever the schedule answers is carried
out at once by whoever told it. An error on the listening thread reaches the trainer at its next call or wait. What an
explorer that died, or hung and was ended, had been asked for is asked of another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_rft.errors import DeadlineError
from lightning_rft.experience import Group, GroupKey, Task
from lightning_rft.explorer.listener import GRACE_S, Listener
from lightning_rft.explorer.messages import (
    Advanced,
    Cancel,
    Died,
    Ended,
    Explore,
    Explored,
    Loaded,
    LoadFailed,
    Started,
)
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.receivers import Receivers
from lightning_rft.explorer.roster import Roster
from lightning_rft.monitor.activity import Activity
from lightning_rft.monitor.spans import Span
from lightning_rft.monitor.status import StatusLine
from lightning_rft.run.error_rate import ErrorRate
from lightning_rft.run.groups import Groups
from lightning_rft.run.pusher import Pusher
from lightning_rft.run.validation import Validation
from lightning_rft.settings import Sampling, Timeouts
from lightning_rft.sync.schedule import Action, Drop, Issue, Lease, Load, Push, Schedule
from lightning_rft.sync.transports.transport import Transport, Weights

__all__ = ["Coordinator"]

_log = logging.getLogger(__name__)


class Coordinator:
    """Connects schedule, explorers and groups for the length of one ``fit``, ``validate`` or ``predict``.

    Args:
        schedule: Decides what is explored when.
        groups: What becomes of each group.
        pool: The explorers, started.
        error_rate: Counts the samples that fail, and ends the run when there are too many.
        timeouts: How long an explorer that has work may make no progress.
        check_interrupt: Called during every wait; raises to end it.
        folder: The run's own folder.
        transport: How weights travel.
        background: Whether weights are pushed in the background.
        gathered: Returns the policy's weights, whole; called on the trainer's thread.
        observers: Called with every span of the timeline.
        status: Shows what is waited for, until the end of the first step.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        groups: Groups,
        pool: ExplorerPool,
        error_rate: ErrorRate,
        timeouts: Timeouts,
        check_interrupt: Callable[[], None],
        folder: Path,
        transport: Transport,
        background: bool,
        gathered: Callable[[], Weights],
        observers: Sequence[Callable[[Span], None]],
        status: StatusLine,
    ) -> None:
        self._schedule = schedule
        self._groups = groups
        self._pool = pool
        self._error_rate = error_rate
        self._load_label = transport.load_label
        self._activity = Activity(observers)
        self._status = status
        self._roster = Roster(timeouts.progress_s)
        self._listener = Listener(pool, self._roster, self._handle, check_interrupt)
        self._lock = self._listener.lock
        self.pusher = Pusher(
            transport,
            background=background,
            roster=self._roster,
            receivers=Receivers(pool, self._roster, self._listener, folder, self._look),
            gathered=gathered,
            pushed=lambda version: self._tell(lambda: self._schedule.pushed(version)),
            failed=self._listener.failed,
            observe=self._activity.observe,
        )
        self._validation = Validation((), run=groups.incarnation, samples=0, sampling=Sampling())
        self._due = False
        self._restarts = pool.restarts

    def start(self) -> None:
        """Starts to listen."""
        for explorer, engine in self._pool.up.items():  # those that an earlier run has started
            self._join(explorer, engine)
        self._listener.start()

    def close(self) -> None:
        """Ends the run: explorers forget its work, what was leased and not trained goes back. Safe to call twice."""
        self._status.clear()
        if self._listener.closed:
            return
        try:
            self.pusher.close()  # while explorers are listened to, since it may wait for one to load
        finally:
            self._listener.close()  # before the pool is stopped: it might just be starting an explorer again
            with self._lock:
                for explorer in self._pool.up:
                    self._pool.send(explorer, Cancel(self._groups.incarnation))
                self._groups.release()

    # What the loader asks

    def wanted(self, batch: int) -> list[Group]:
        """Waits for a batch and leases it; returns it, and what is replayed along with it.

        Raises:
            ScheduleError: It is not the batch that comes next.
            DeadlineError: Explorers sent no news for ``Timeouts.progress_s``.
            Exception: Whatever failed in an explorer.
        """
        began = time.monotonic()
        if self._groups.leased is None:  # else a hook has ended the epoch before its batch was trained
            self._tell(lambda: self._schedule.wanted(batch))
        with self._status:
            while True:
                self._wait_served(
                    lambda: self._groups.leased is not None,
                    f"batch {batch} of experience",
                    lambda: self._show_exploring(batch),
                )
                if not self._refuse_stale(batch):
                    break
        self._status.bar_only = True
        self._status.say(f"training on batch {batch}")
        self._activity.trainer_waited("experience", began, batch=batch)
        return self._groups.with_replay(batch)

    def kept(self, index: int) -> tuple[int, list[Group]]:
        """Waits for a batch that nobody will train in this run: it stays in the buffer, ready.

        Args:
            index: Counts the batches of this run.

        Returns:
            The batch's number, and its groups.

        Raises:
            DeadlineError: Explorers sent no news for ``Timeouts.progress_s``.
            Exception: Whatever failed in an explorer.
        """
        self._listener.raise_failures()
        batch = self._schedule.version + index  # nothing is trained, so the version stays
        with self._status:
            self._wait_served(
                lambda: self._schedule.is_ready(batch),
                f"batch {batch} of experience",
                lambda: self._show_exploring(batch),
            )
        self._end_status()
        with self._lock:
            return batch, self._groups.read(batch)

    # What the trainer does

    @property
    def version(self) -> int:
        """Batches trained so far."""
        return self._schedule.version

    def push_first(self) -> None:
        """Waits for every engine to be up, and brings the first version to all of them; the pool has the deadline."""

        def show() -> None:
            self._status.say("waiting for explorers", len(self._pool.up), self._pool.count, "ready")

        with self._status:
            self._listener.wait(lambda: self._pool.ready, "the explorers to start", show=show)
            self._status.say(f"pushing weights (version {self.version})")
            self.pusher.share_changed(self.pusher.push(self.version))
            self.pusher.wait_loaded()

    def trained(self, batch: int) -> dict[str, float]:
        """Takes in that a batch was trained, and pushes the weights if that is due; returns what is to be logged."""
        self._listener.raise_failures()
        self.take_in(batch + 1)
        began = time.monotonic()
        due = self._wait_due()
        waited = time.monotonic()
        if due:
            self._status.say(f"pushing weights (version {self.version})")
        weights = self.pusher.push(self.version) if due else None
        self._end_status()  # from now on the progress bar moves
        logged = {
            "rft/version": float(self.version),
            "rft/wait_push_s": waited - began,
            "rft/sync_s": time.monotonic() - waited if due else 0.0,
        }
        if weights is not None:  # looked at when nobody waits for the push any more
            logged["rft/weights_changed"] = self.pusher.share_changed(weights)
        return logged | self.metrics()

    def take_in(self, version: int) -> None:
        """Notes that what is leased is part of the weights, which are this version now."""
        with self._lock:
            if self._groups.leased is not None and version == self.version + 1:
                self._groups.trained(self.version)
                self._carry_out(self._schedule.trained(self.version))

    def push_last(self) -> None:
        """Pushes the last version if it was not, and returns when explorers have loaded it."""
        if self.pusher.version < self.version:
            self.pusher.push(self.version)
        self.pusher.wait_loaded()

    def failed(self, error: BaseException) -> None:
        """Ends every wait with what went wrong elsewhere; the first error counts."""
        self._listener.failed(error)

    def _wait_due(self) -> bool:
        """Whether a push is due now, waiting first for what older weights must still explore."""
        if self._schedule.push_pending:
            began = time.monotonic()
            self._wait_served(lambda: self._due, "the groups that belong to the old weights")
            self._activity.trainer_waited("push", began, version=self.version)
        with self._lock:
            due, self._due = self._due, False
        return due

    # What is told of the run

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, for a checkpoint: plain values."""
        with self._lock:
            return self._groups.state_dict(self._schedule.progress)

    def metrics(self) -> dict[str, float]:
        """What explorers did since the last call, in seconds (their mean), and what went wrong so far."""
        with self._lock:
            self._look()
            return {
                **self._activity.metrics(),
                **self._groups.metrics(),
                "rft/failed_samples": float(self._error_rate.failed),
                "rft/retried_samples": float(self._error_rate.retried),
                "rft/explorer_restarts": float(self._pool.restarts - self._restarts),
            }

    def summary(self) -> str:
        """One line about who waited for whom, and what to change."""
        with self._lock:
            self._look()
            return self._activity.summary()

    # What validation asks

    def explore(self, tasks: Sequence[Task], *, samples: int, sampling: Sampling) -> None:
        """Has tasks answered beside the schedule, with whatever version is loaded."""
        self._listener.raise_failures()
        with self._lock:
            run = self._groups.incarnation
            self._validation = Validation(tasks, run=run, samples=samples, sampling=sampling)
            self._ask()

    def explored(self, index: int) -> Group:
        """Waits for the answers to one of the tasks of :meth:`explore`; without those that failed after every retry."""
        with self._status:
            self._wait_served(
                lambda: index in self._validation.answers,
                f"validation task {index}",
                lambda: self._status.say("exploring validation", *self._validation.progress, "tasks"),
            )
        return self._validation.answers[index]

    # How the schedule is told, and what it answers carried out

    def _tell(self, event: Callable[[], list[Action]]) -> None:
        self._listener.raise_failures()
        with self._lock:
            self._carry_out(event())

    def _carry_out(self, actions: Sequence[Action]) -> None:
        issues = [(action.group, action.explorer) for action in actions if isinstance(action, Issue)]
        for action in actions:
            if isinstance(action, Lease):
                self._groups.lease(action.groups)
            elif isinstance(action, Push):
                self._due = True
            elif isinstance(action, Load):
                self.pusher.load(action.explorer)
            elif isinstance(action, Drop):
                self._drop(action.group, action.explorer)
        if issues:
            self._send(self._groups.issue(issues))
        self._look()

    def _send(self, told: Sequence[tuple[Explore, int]]) -> None:
        """Sends each explorer what it is to explore, all together."""
        asked: dict[int, list[Explore]] = {}
        for message, explorer in told:
            self._roster.asked(explorer, message.key, len(message.seeds), time.monotonic())
            asked.setdefault(explorer, []).append(message)
        for explorer, messages in asked.items():
            self._pool.send(explorer, *messages)

    def _drop(self, key: GroupKey, explorer: int | None) -> None:
        self._groups.drop(key)
        if explorer is not None:
            self._roster.answered(explorer, key, time.monotonic())
            self._pool.send(explorer, Cancel(self._groups.incarnation, key))

    def _join(self, explorer: int, engine: Started) -> None:
        self._roster.started(explorer, engine)
        self._carry_out(self._schedule.joined(explorer, engine.room))

    def _refuse_stale(self, batch: int) -> bool:
        """Sends back what is too old to be trained; whether there was any."""
        with self._lock:
            stale = self._groups.refuse_stale(batch)
        if stale:
            self._tell(lambda: self._schedule.refused(stale))
        return bool(stale)

    def _look(self) -> None:
        """Notes what every explorer does, since that may just have changed."""
        loading, waits_for = self._roster.is_loading, self._schedule.waits_for
        self._activity.explorers(
            {
                explorer: "load" if loading(explorer) else waits_for(explorer) or "explore"
                for explorer in self._schedule.explorers
            }
        )

    def _show_exploring(self, batch: int) -> None:
        self._status.say(f"exploring batch {batch}", *self._schedule.arrived(batch), "groups")

    def _end_status(self) -> None:
        self._status.clear()
        self._status = StatusLine(None)

    def _wait_served(self, done: Callable[[], bool], what: str, show: Callable[[], None] = lambda: None) -> None:
        """Waits on the trainer's thread, as long as explorers make progress; brings weights to those that come up."""
        self._listener.heard = time.monotonic()  # an idle stretch before this wait is nobody's fault
        limit = self._roster.timeout_s + GRACE_S  # a hung explorer is ended before its silence ends the wait

        def silence() -> float:
            return time.monotonic() - self._listener.heard

        while True:
            with self._lock:
                late = self._roster.load_alone()
            self.pusher.push_alone(self.version, late)
            self._listener.wait(lambda: done() or self._roster.any_needs_weights or silence() > limit, what, show=show)
            if done():
                return
            if not self._roster.any_needs_weights:
                raise DeadlineError(
                    f"waited {silence():.0f} s for {what} without any news from the "
                    f"explorers: raise Timeouts(progress_s={self._roster.timeout_s:g}), or see their logs"
                )

    # What explorers report, on the listening thread

    def _handle(self, explorer: int, message: Any) -> None:
        now = time.monotonic()
        if isinstance(message, Started):
            self._join(explorer, message)
        elif isinstance(message, Died):
            self._died(explorer, message.error)
        elif isinstance(message, Advanced):
            self._roster.advanced(explorer, now)
        elif isinstance(message, Loaded):
            began, alone = self._roster.loaded(explorer, message.version, now)
            self._activity.observe(f"explorer {explorer}", self._load_label, began, message.version)
            self._carry_out(self._schedule.loaded(explorer, message.version, alone=alone))
            self._ask()
        elif isinstance(message, LoadFailed):
            self._roster.load_broke_off(explorer, now)
        elif isinstance(message, Ended) and message.run == self._groups.incarnation:
            self._ended(explorer, message)
        elif isinstance(message, Explored) and message.run == self._groups.incarnation:
            if Validation.owns(message.key):
                self._answered(explorer, message, now)
            elif self._groups.expects(message.key, message.attempt):
                self._explored(explorer, message, now)

    def _ended(self, explorer: int, message: Ended) -> None:
        """Has others take the room of samples that ended; validation's are not limited by room, nor take any."""
        ended = {
            key: number for (key, attempt), number in message.samples.items() if self._groups.expects(key, attempt)
        }
        for key, number in ended.items():
            self._roster.ended(explorer, key, number)
        explored = {key: number for key, number in ended.items() if not Validation.owns(key)}
        if explored:
            self._carry_out(self._schedule.samples_ended(explored))

    def _answered(self, explorer: int, message: Explored, now: float) -> None:
        self._roster.answered(explorer, message.key, now)
        self._error_rate.take(message, f"explorer {explorer}")
        self._validation.answered(message)

    def _explored(self, explorer: int, message: Explored, now: float) -> None:
        began = self._roster.answered(explorer, message.key, now)
        self._error_rate.take(message, f"explorer {explorer}")
        key, group = message.key, Group(message.key, message.task_id, message.experiences)
        oldest = group.oldest_version if group.experiences else None
        self._activity.observe(f"explorer {explorer}", "rollout", began, oldest, key.batch)
        score = self._groups.keep(group, message, self._schedule.version)
        if score is None:
            self._carry_out(self._schedule.failed(key))
        else:
            self._activity.observe("buffer", "put", now, oldest, key.batch)
            self._carry_out(self._schedule.ready(key, oldest, score))

    def _ask(self) -> None:
        """Has explorers that have weights explore what of validation nobody works on."""
        able = self._roster.with_weights
        if able:
            questions = self._validation.open(self._roster.work)
            self._send([(question, able[question.key.slot % len(able)]) for question in questions])

    def _died(self, explorer: int, error: Exception) -> None:
        """Has others do what an explorer that died worked on."""
        _log.warning("another explorer is started, since %s", error)
        record = self._roster.died(explorer)
        if record is not None:
            self._groups.lost(record.work, error, self._schedule.version)
            self._carry_out(self._schedule.died(explorer))
            self._ask()
