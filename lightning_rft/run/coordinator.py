"""The trainer's side of a run: what loader, strategy and validation ask for, and how long they wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_rft.errors import DeadlineError
from lightning_rft.experience import Group, Task
from lightning_rft.explorer.listener import GRACE_S
from lightning_rft.explorer.receivers import Receivers
from lightning_rft.monitor.status import StatusLine
from lightning_rft.run.dispatcher import Dispatcher
from lightning_rft.run.handover import Handover
from lightning_rft.run.pusher import Pusher
from lightning_rft.run.validation import Validation
from lightning_rft.settings import Sampling
from lightning_rft.sync.transports.transport import Transport

__all__ = ["Coordinator"]


class Coordinator:
    """Connects trainer and explorers for the length of one ``fit``, ``validate`` or ``predict``.

    Every wait ends with an exception where an explorer failed, the run is interrupted, or explorers that have work
    sent no news for ``Timeouts.progress_s`` (:class:`DeadlineError`).

    Args:
        dispatcher: Schedule and explorers.
        transport: How weights travel.
        background: Whether weights are pushed in the background.
        gathered: As a :class:`~lightning_rft.run.pusher.Pusher` takes it, and a :class:`Handover`.
        folder: The run's own folder.
        status: Shows what is waited for, until the end of the first step.
        sleep_s: Seconds that explorers may take to sleep or wake, where they share the trainer's GPUs; else ``None``.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        transport: Transport,
        *,
        background: bool,
        gathered: Callable[..., Iterator[Any]],
        folder: Path,
        status: StatusLine,
        sleep_s: float | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._schedule = dispatcher.schedule
        self._groups = dispatcher.groups
        self._pool = dispatcher.pool
        self._listener = dispatcher.listener
        self._activity = dispatcher.activity
        self._roster = dispatcher.roster
        self._status = status
        self._restarts = self._pool.restarts
        receivers = Receivers(self._pool, self._roster, self._listener, folder, dispatcher.look)
        self._pusher = Pusher(
            transport,
            background=background,
            roster=self._roster,
            receivers=receivers,
            gathered=gathered,
            expect=dispatcher.expect,
            pushed=lambda version: dispatcher.tell(dispatcher.schedule.pushed, version),
            failed=self._listener.failed,
            observe=self._activity.observe,
        )
        self._handover = Handover(
            dispatcher,
            self._pusher,
            receivers,
            together=gathered,
            shared=sleep_s is not None,
            timeout_s=sleep_s or 0.0,
        )
        dispatcher.load = self._pusher.load

    def start(self) -> None:
        """Starts to listen to explorers."""
        self._dispatcher.start()

    def close(self) -> None:
        """Ends the run; safe to call twice."""
        self._status.clear()
        if not self._listener.closed:
            try:
                self._pusher.close()  # while explorers are listened to, since it may wait for one to load
            finally:
                self._dispatcher.close()

    # What the loader asks

    @property
    def version(self) -> int:
        """Batches trained so far."""
        return self._schedule.version

    @property
    def on_policy(self) -> bool:
        """Whether every token of a batch is sampled with the weights that it trains."""
        return self._schedule.rule.max_staleness == 0

    def wanted(self, batch: int) -> list[Group]:
        """Waits for a batch and leases it; returns it, and what is replayed along with it."""
        began = time.monotonic()
        if self._groups.leased is None:  # else a hook has ended the epoch before its batch was trained
            self._dispatcher.tell(self._schedule.wanted, batch)
        with self._status:
            if self._groups.leased is None:
                self._handover.to_explorers()
            self._to_trainer(batch)
        self._status.bar_only = True
        self._status.say(f"training on batch {batch}")
        self._activity.trainer_waited("experience", began, batch=batch)
        return self._groups.with_replay(batch)

    def kept(self, index: int) -> tuple[int, list[Group]]:
        """Waits for the ``index``-th batch of a run that trains nothing: it stays in the buffer, ready.

        Returns the batch's number, and its groups.
        """
        self._listener.raise_failures()
        batch = self._schedule.version + index  # nothing is trained, so the version stays
        with self._status:
            self._wait_for_batch(batch, lambda: self._schedule.order.is_ready(batch))
        self._end_status()
        with self._listener.locked():
            return batch, self._groups.kept(batch)

    # What the strategy tells

    def push_first(self, warm_up: Iterable[Callable[[], None]] = ()) -> None:
        """Waits for every engine to be up, and brings the first version to all of them; the pool has the deadline.

        Until they are up it does what there is to ``warm_up``, piece by piece.
        """

        def show() -> None:
            self._status.say("waiting for explorers", len(self._pool.up), self._pool.count, "ready")

        with self._status:
            for piece in warm_up:
                if self._pool.ready:
                    break
                self._listener.raise_failures()
                show()
                piece()
            self._listener.wait(lambda: self._pool.ready, "the explorers to start", show=show)
            self._status.say(f"pushing weights (version {self.version})")
            self._push()
            self._pusher.wait_loaded()

    def trained(self, batch: int, sampling_gap: float | None = None) -> dict[str, float]:
        """Takes in that a batch was trained, and pushes the weights if that is due; returns what is to be logged."""
        if sampling_gap is not None:
            with self._listener.locked():
                self._dispatcher.agreement.sampled(batch, sampling_gap)
        self._listener.raise_failures()
        self.take_in(batch + 1)
        began = time.monotonic()
        due = self._wait_for_push()
        waited = time.monotonic()
        if due:
            self._status.say(f"pushing weights (version {self.version})")
            self._push()
        self._end_status()  # from now on the progress bar moves
        logged = {
            "rft/version": float(self.version),
            "rft/wait_push_s": waited - began,
            "rft/sync_s": time.monotonic() - waited if due else 0.0,
        }
        if due:
            logged["rft/weights_changed"] = self._pusher.share_changed()
        return logged | self._metrics()

    def take_in(self, version: int) -> None:
        """Notes that what is leased is part of the weights, which are this version: after a step, or when saved."""
        if self._groups.leased is not None and version == self.version + 1:
            self._dispatcher.trained(self.version)

    def push_last(self) -> None:
        """Pushes the last version if it was not, and returns when explorers have loaded it."""
        if self._pusher.version < self.version:
            self._push()
        self._handover.to_explorers()
        self._wait_proven()

    def _to_trainer(self, batch: int) -> None:
        """Waits for a batch, and where GPUs are shared for the end of all exploring, to put explorers to sleep."""
        self._wait_for_batch(batch, lambda: self._groups.leased is not None and self._handover.idle)
        self._handover.to_trainer(batch)

    def _push(self) -> None:
        """Pushes, where GPUs are shared to explorers that wake for it."""
        self._handover.to_explorers(pushes=True)
        self._pusher.push(self.version)
        self._handover.to_explorers()

    def _wait_proven(self) -> None:
        """Waits for explorers to load the last push, and to prove it: no later wait would hear that they did not."""
        self._pusher.wait_loaded()
        # an explorer that does not is overdue some time
        self._listener.wait(lambda: not self._roster.any_unproven, "explorers to prove that weights arrived")

    def failed(self, error: BaseException) -> None:
        """Ends every wait with what went wrong elsewhere; the first error counts."""
        self._listener.failed(error)

    # What validation asks

    def explore(self, tasks: Sequence[Task], *, samples: int, sampling: Sampling) -> None:
        """Has tasks answered beside the schedule, with the version that is loaded."""
        self._listener.raise_failures()
        if tasks:
            self._handover.to_explorers()
        self._dispatcher.ask(Validation(tasks, run=self._groups.incarnation, samples=samples, sampling=sampling))

    def explored(self, index: int) -> Group:
        """Waits for the answers to one of the tasks of :meth:`explore`; without those that failed after every retry."""
        validation = self._dispatcher.validation
        with self._status:
            self._wait(
                lambda: index in validation.answers,
                f"validation task {index}",
                lambda: self._status.say("exploring validation", *validation.progress, "tasks"),
            )
            if validation.done and self._groups.leased is not None:  # in the middle of a batch
                self._to_trainer(self.version)
        return validation.answers[index]

    # What is told of the run

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, for a checkpoint: plain values."""
        with self._listener.locked():
            return self._groups.state_dict(self._schedule.order.progress)

    def summary(self) -> str:
        """One line about who waited for whom, and what to change."""
        with self._listener.locked():
            self._dispatcher.look()
            return self._activity.summary()

    def _metrics(self) -> dict[str, float]:
        """What explorers did since the last call, in seconds (their mean), and what went wrong so far."""
        with self._listener.locked():
            self._dispatcher.look()
            return {
                **self._activity.metrics(),
                **self._groups.metrics(),
                **self._dispatcher.error_rate.metrics(),
                **self._dispatcher.agreement.metrics(),
                "rft/explorer_restarts": float(self._pool.restarts - self._restarts),
            }

    # How it waits

    def _wait_for_batch(self, batch: int, done: Callable[[], bool]) -> None:
        def show() -> None:
            self._status.say(f"exploring batch {batch}", *self._schedule.order.arrived(batch), "groups")

        self._wait(done, f"batch {batch} of experience", show)

    def _wait_for_push(self) -> bool:
        """Whether a push is due now, waiting first for what older weights must still explore."""
        if self._schedule.push_pending:
            if not self._dispatcher.push_due:
                self._handover.to_explorers()
            began = time.monotonic()
            self._wait(lambda: self._dispatcher.push_due, "the groups that belong to the old weights")
            self._activity.trainer_waited("push", began, version=self.version)
        return self._dispatcher.take_push()

    def _wait(self, done: Callable[[], bool], what: str, show: Callable[[], None] = lambda: None) -> None:
        """Waits on the trainer's thread, as long as explorers make progress; brings weights to those that come up."""
        listener, roster = self._listener, self._roster
        listener.heard = time.monotonic()  # an idle stretch before this wait is nobody's fault
        limit = roster.timeout_s + GRACE_S  # a hung explorer is ended before its silence ends the wait

        def silence() -> float:
            return time.monotonic() - listener.heard

        while True:
            self._pusher.push_late(self.version)
            listener.wait(lambda: done() or roster.any_needs_weights or silence() > limit, what, show=show)
            if done():
                return
            if not roster.any_needs_weights:
                raise DeadlineError(
                    f"waited {silence():.0f} s for {what} without any news from the explorers: raise "
                    f"Timeouts(progress_s={roster.timeout_s:g}), or see their logs"
                )

    def _end_status(self) -> None:
        self._status.clear()
        self._status = StatusLine(None)
