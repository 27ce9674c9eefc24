"""Between schedule and explorers: what they report is told to the schedule, and what it answers is carried out.

A thread listens to the explorers. It and the trainer's thread share one lock; whoever tells the schedule of an event
carries out at once what it answers. What an explorer that died had been asked for is asked of another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

from lightning_rft.experience import GroupKey
from lightning_rft.explorer.engines.sleeping import DROPS
from lightning_rft.explorer.listener import Listener
from lightning_rft.explorer.messages import (
    Advanced,
    Cancel,
    Died,
    Ended,
    Explore,
    Explored,
    Loaded,
    LoadFailed,
    Sampled,
    Scored,
    Sleep,
    Slept,
    Started,
    Woken,
)
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.roster import Roster
from lightning_rft.explorer.turns import Told, Turns
from lightning_rft.monitor.activity import Activity
from lightning_rft.run.agreement import Agreement
from lightning_rft.run.error_rate import ErrorRate
from lightning_rft.run.groups import Groups, Judged
from lightning_rft.run.validation import Validation
from lightning_rft.settings import Sampling, Timeouts
from lightning_rft.sync.schedule import Action, Drop, Issue, Lease, Load, Push, Schedule
from lightning_rft.trainer.scoring import Scores

__all__ = ["Dispatcher"]

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")


class Dispatcher:
    """Has the explorers of ``pool`` do what the schedule says; ``groups`` and ``error_rate`` keep count of the rest.

    ``load_label`` names a load in the timeline of ``activity``; ``check_interrupt`` raises to end a wait.
    """

    def __init__(
        self,
        schedule: Schedule,
        groups: Groups,
        pool: ExplorerPool,
        error_rate: ErrorRate,
        activity: Activity,
        agreement: Agreement,
        *,
        timeouts: Timeouts,
        check_interrupt: Callable[[], None],
        load_label: str,
    ) -> None:
        self.schedule = schedule
        self.groups = groups
        self.pool = pool
        self.error_rate = error_rate
        self.activity = activity
        self.agreement = agreement
        self.roster = Roster(timeouts.progress_s)
        self.listener = Listener(pool, self.roster, self.handle, check_interrupt)
        #: Which explorers sleep.
        self.turns = Turns()
        #: The tasks that are answered beside the schedule.
        self.validation = Validation((), run=groups.incarnation, samples=0, sampling=Sampling())
        #: Has explorers load the newest version, together; returns at once.
        self.load: Callable[..., None] = self.roster.want_weights
        #: Whether a push is due.
        self.push_due = False
        self._load_label = load_label

    def start(self) -> None:
        """Starts to listen, and takes in the explorers that an earlier run has started."""
        for explorer, engine in self.pool.up.items():
            self._join(explorer, engine)
        self.listener.start()

    def close(self) -> None:
        """Stops listening; explorers forget the run's work, and what was leased and not trained goes back."""
        self.listener.close()  # before the pool is stopped: it might just be starting an explorer again
        with self.listener.locked():
            for explorer in self.pool.up:
                self.pool.send(explorer, Cancel(self.groups.incarnation))
            self.groups.release()

    # The schedule

    def tell(self, event: Callable[_P, list[Action]], *args: _P.args, **kwargs: _P.kwargs) -> None:
        """Tells the schedule of an event, by one of its methods, and carries out what it answers."""
        self.listener.raise_failures()
        with self.listener.locked():
            self._carry_out(event(*args, **kwargs))

    def trained(self, batch: int) -> None:
        """Notes that what is leased is part of the weights; also while the run ends with an error."""
        with self.listener.locked():
            self.groups.trained(batch)
            self._carry_out(self.schedule.trained(batch))

    def expect(self, version: int, scores: Scores) -> None:
        """Notes how the trainer scores the text that proves a push; raises if an explorer scored it otherwise."""
        with self.listener.locked():
            self.agreement.expect(version, scores)

    def take_push(self) -> bool:
        """Whether a push has become due since the last call."""
        with self.listener.locked():
            due, self.push_due = self.push_due, False
        return due

    def look(self) -> None:
        """Notes what every explorer does, since that may just have changed; under the lock."""
        loading, waits_for = self.roster.is_loading, self.schedule.waits_for
        self.activity.explorers(
            {
                explorer: "load" if loading(explorer) else waits_for(explorer) or "explore"
                for explorer in self.schedule.explorers
            }
        )

    def _carry_out(self, actions: Sequence[Action]) -> None:
        issues = [(action.group, action.explorer) for action in actions if isinstance(action, Issue)]
        loads = [action.explorer for action in actions if isinstance(action, Load)]
        for action in actions:
            if isinstance(action, Issue):
                self.groups.partials.drop_older(action.group, action.oldest)
            elif isinstance(action, Lease):
                self.groups.lease(action.groups, self.schedule.version)
            elif isinstance(action, Push):
                self.push_due = True
            elif isinstance(action, Drop):
                self._drop(action.group, action.explorer)
        if loads:
            self.load(*loads)
        if issues:
            self._send(self.groups.issue(issues))
        self.look()

    def _drop(self, key: GroupKey, explorer: int | None) -> None:
        self.groups.drop(key)
        if explorer is not None:
            self.roster.answered(explorer, key, time.monotonic())
            self.pool.send(explorer, Cancel(self.groups.incarnation, key))

    def _send(self, told: Sequence[tuple[Explore, int]]) -> None:
        """Sends each explorer what it is to explore, all together."""
        asked: dict[int, list[Explore]] = {}
        for message, explorer in told:
            self.roster.asked(explorer, message.key, len(message.seeds), time.monotonic())
            asked.setdefault(explorer, []).append(message)
        for explorer, messages in asked.items():
            self.pool.send(explorer, *messages)

    def turn(self, told: Told) -> None:
        """Has explorers sleep or wake; under the lock."""
        for explorer, message in told:
            if isinstance(message, Sleep):
                self.roster.sleeps(explorer, forgets=message.level == DROPS)
            self.pool.send(explorer, message)

    # Validation

    def ask(self, validation: Validation | None = None) -> None:
        """Has explorers that have weights explore what of validation nobody works on; of a new one, if it is given."""
        with self.listener.locked():
            self.validation = validation or self.validation
            able = self.roster.with_weights
            if able and not self.turns.trains:
                questions = self.validation.open(self.roster.work)
                self._send([(question, able[question.key.slot % len(able)]) for question in questions])

    # The explorers

    def handle(self, explorer: int, message: Any) -> None:
        """Takes in what an explorer reports, on the listening thread."""
        judged = None
        if isinstance(message, Explored) and self._is_expected(message) and not Validation.owns(message.key):
            judged = self.groups.judged(message)  # without the lock: it calls functions of the user
        with self.listener.locked():
            self._take_in(explorer, message, judged)

    def _take_in(self, explorer: int, message: Any, judged: Judged | None) -> None:
        now = time.monotonic()
        if isinstance(message, Started):
            self._join(explorer, message)
        elif isinstance(message, Died):
            self._died(explorer, message.error)
        elif isinstance(message, Advanced):
            self.roster.advanced(explorer, now)
        elif isinstance(message, Loaded):
            began, alone = self.roster.loaded(explorer, message.version, now)
            self.turns.loaded(explorer)
            self.activity.observe(f"explorer {explorer}", self._load_label, began, message.version)
            self._carry_out(self.schedule.loaded(explorer, message.version, alone=alone))
            self.ask()
        elif isinstance(message, Scored):
            self.roster.scored(explorer, now)
            self.agreement.scored(explorer, message.version, message.logprobs)
        elif isinstance(message, Slept | Woken):
            self.turns.answered(explorer, message)
        elif isinstance(message, LoadFailed):
            self.roster.load_broke_off(explorer, now)
        elif isinstance(message, Ended) and message.run == self.groups.incarnation:
            self._ended(explorer, message)
        elif isinstance(message, Sampled) and self._is_expected(message):
            self.groups.partials.take(message)
        elif isinstance(message, Explored) and self._is_expected(message):
            began = self.roster.answered(explorer, message.key, now)
            self.error_rate.take(message, f"explorer {explorer}")
            if judged is None:
                self.validation.answered(message)
            else:
                self._explored(explorer, message, judged, began)

    def _is_expected(self, message: Explored | Sampled) -> bool:
        """Whether a group belongs to this run, and was not given up since it was issued."""
        return message.run == self.groups.incarnation and self.groups.expects(message.key, message.attempt)

    def _join(self, explorer: int, engine: Started) -> None:
        self.roster.started(explorer, engine)
        self._carry_out(self.schedule.joined(explorer, engine.room))
        self.turn(self.turns.joined(explorer))

    def _ended(self, explorer: int, message: Ended) -> None:
        """Has others take the room of samples that ended; validation's are not limited by room, nor take any."""
        ended = {key: number for (key, attempt), number in message.samples.items() if self.groups.expects(key, attempt)}
        for key, number in ended.items():
            self.roster.ended(explorer, key, number)
        explored = {key: number for key, number in ended.items() if not Validation.owns(key)}
        if explored:
            self._carry_out(self.schedule.samples_ended(explored))

    def _explored(self, explorer: int, message: Explored, judged: Judged, began: float) -> None:
        key, oldest = message.key, judged.oldest
        self.activity.observe(f"explorer {explorer}", "rollout", began, oldest, key.batch)
        if self.groups.keep(judged, self.schedule.version, self.schedule.order.trained_by(key)):
            self.activity.observe("buffer", "put", time.monotonic(), oldest, key.batch)
            self._carry_out(self.schedule.ready(key, oldest, judged.score))
        else:
            self._carry_out(self.schedule.failed(key))

    def _died(self, explorer: int, error: Exception) -> None:
        """Has others do what an explorer that died worked on."""
        _log.warning("another explorer is started, since %s", error)
        self.turns.died(explorer)
        record = self.roster.died(explorer)
        if record is not None:
            self.groups.lost(record.work, error, self.schedule.version)
            self._carry_out(self.schedule.died(explorer, {key for key in record.work if key in self.groups.partials}))
            self.ask()
