"""One run of a strategy's schedule on a fake clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf

from lightning_rft.errors import ScheduleError
from lightning_rft.experience import GroupKey, Progress
from lightning_rft.simulation.clock import Clock
from lightning_rft.simulation.events import Event
from lightning_rft.simulation.explorer import SimulatedExplorer, Work
from lightning_rft.sync.order import Order
from lightning_rft.sync.schedule import Action, Drop, Issue, Lease, Load, Push, Rule, Schedule

__all__ = ["Circumstances", "History", "Run"]


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """The arguments of :func:`~lightning_rft.testing.drive` that hold for every run."""

    batches: int
    size: Callable[[int], int]
    explorers: int
    samples: int
    duration: Callable[[GroupKey, int], float | Sequence[float]]
    score_time: float
    train_time: float
    push_time: float
    load_time: float
    fails: Callable[[GroupKey, int], bool]
    deaths: Sequence[tuple[float, int]]
    joins: Sequence[tuple[float, int]]
    capacity: int | None
    room: int | None
    score: Callable[[GroupKey], float]
    keeps: bool


@dataclass
class History:
    """What outlives a run."""

    events: list[Event] = field(default_factory=list)
    attempts: Counter[GroupKey] = field(default_factory=Counter)
    stored: dict[GroupKey, tuple[int, int]] = field(default_factory=dict)  #: Oldest and newest version.
    checkpoints: dict[int, Progress] = field(default_factory=lambda: {0: Progress(0)})

    def rewind(self, back: int, max_staleness: int) -> tuple[Progress, dict[GroupKey, int]]:
        """Returns to a checkpoint; the result is it and what is still ready, with the oldest version of each."""
        saved = sorted(self.checkpoints)
        version = saved[max(0, len(saved) - 1 - back)]
        progress = self.checkpoints[version]
        ready = {
            group: oldest
            for group, (oldest, newest) in self.stored.items()
            if not progress.trained(group) and version - max_staleness <= oldest and newest <= version
        }
        self.stored = {group: kept for group, kept in self.stored.items() if group in ready or progress.trained(group)}
        self.checkpoints = {number: saved for number, saved in self.checkpoints.items() if number <= version}
        return progress, ready


class Run:
    """Explorers and trainer from the start of a run, or from a checkpoint, until all is trained or the trainer dies."""

    def __init__(
        self,
        rule: Rule,
        given: Circumstances,
        history: History,
        *,
        now: float = 0.0,
        progress: Progress = Progress(0),  # noqa: B008 (immutable)
        ready: Mapping[GroupKey, int] | None = None,
    ) -> None:
        self._rule, self._given, self._history = rule, given, history
        order = Order(
            rule,
            size=given.size,
            stop=given.batches,
            capacity=given.capacity,
            progress=progress,
            ready=ready,
            scores={group: given.score(group) for group in ready or ()},
        )
        self._schedule = Schedule(order, given.samples)
        self._clock = Clock(now)
        self._explorers: dict[int, SimulatedExplorer] = {}
        self._known: set[int] = set()  # explorers, the dead ones too
        self._running: dict[GroupKey, Work] = {}
        self._kept: dict[GroupKey, int] = {}  # what dead explorers had begun, with the version they began with
        self._background: list[int] = []  # versions on their way to be loadable
        self._busy = False  # the trainer: it trains, pushes, or brings weights to one explorer
        self._late: deque[int] = deque()  # explorers that wait for that
        self._job: Callable[[], None] | None = None  # what the trainer does next
        for explorer in range(given.explorers):
            self._join(explorer)
        for when, explorer in given.deaths:
            self._clock.at(when, partial(self._die, explorer))
        for when, explorer in given.joins:
            self._clock.at(when, partial(self._join, explorer))
        self._push(progress.version)
        if rule.asynchronous:
            self._continue()

    def ends_before(self, time: float = inf) -> bool:
        """Lets everything happen that does before a time; whether all batches are trained then."""
        while self._schedule.pushed_version < self._given.batches:
            if self._clock.next == inf:
                raise ScheduleError(
                    f"deadlock: {self._schedule.version} of {self._given.batches} batches are trained, version "
                    f"{self._schedule.pushed_version} was pushed last, and nothing can happen any more; explorers "
                    f"have loaded { {index: explorer.loaded for index, explorer in self._explorers.items()} }"
                )
            if self._clock.next >= time:
                return False
            self._clock.jump()
        return True

    def _note(
        self,
        what: str,
        version: int,
        group: GroupKey | None = None,
        explorer: int | None = None,
        groups: tuple[GroupKey, ...] = (),
    ) -> None:
        self._history.events.append(Event(self._clock.now, what, version, group, explorer, groups))

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Issue):
                self._issue(action)
            elif isinstance(action, Lease):
                self._job = partial(self._train, action)
            elif isinstance(action, Push):
                self._push(action.version)
            elif isinstance(action, Load) and self._rule.asynchronous:
                self._note("loading", action.version, explorer=action.explorer)
                self._explorers[action.explorer].hold(self._given.load_time)
                seconds = self._given.load_time or self._given.push_time
                self._clock.after(seconds, partial(self._load_newest, action.explorer))
            elif isinstance(action, Load):
                self._late.append(action.explorer)
            elif isinstance(action, Drop):
                self._drop(action)
        self._next_job()

    # Explorers

    def _join(self, explorer: int) -> None:
        if explorer not in self._known:
            self._known.add(explorer)
            self._explorers[explorer] = SimulatedExplorer(self._clock, self._given.room, self._ended)
            self._note("joined", -1, explorer=explorer)
            self._carry_out(self._schedule.joined(explorer, self._given.room))

    def _die(self, explorer: int) -> None:
        if explorer in self._explorers:
            dead = self._explorers.pop(explorer)
            dead.die()
            self._note("died", dead.loaded, explorer=explorer)
            lost = [work for work in self._running.values() if work.explorer == explorer]
            self._running = {group: work for group, work in self._running.items() if work.explorer != explorer}
            kept = {work.group: work.version for work in lost if work.begun and self._given.keeps}
            self._kept |= kept
            self._carry_out(self._schedule.died(explorer, kept))

    def _issue(self, issue: Issue) -> None:
        group, explorer = issue.group, issue.explorer
        attempt, samples, version = self._history.attempts[group], self._given.samples, self._explorers[explorer].loaded
        self._history.attempts[group] += 1
        work = self._running[group] = Work(group, explorer, attempt, version, samples)
        self._note("issued", version, group, explorer)
        kept = self._kept.pop(group, None)
        if kept is not None and issue.oldest <= kept <= version:
            work.version, work.begun = kept, True
        seconds = self._given.duration(group, attempt)
        self._explorers[explorer].add(work, [seconds] * samples if isinstance(seconds, int | float) else seconds)

    def _drop(self, drop: Drop) -> None:
        self._history.stored.pop(drop.group, None)
        work = self._running.pop(drop.group, None)
        self._note("dropped", -1 if work is None else work.version, drop.group, drop.explorer)
        if work is not None:
            self._explorers[work.explorer].forget(work)

    def _ended(self, work: Work) -> None:
        self._note("ended", work.version, work.group, work.explorer)
        if not work.left:
            self._clock.after(self._given.score_time, partial(self._finish, work))
        self._carry_out(self._schedule.samples_ended({work.group: 1}))

    def _finish(self, work: Work) -> None:
        group, explorer, version = work.group, work.explorer, work.version
        if self._running.get(group) is not work:
            return  # its explorer died, or it was dropped
        del self._running[group]
        if self._given.fails(group, work.attempt):
            self._note("failed", version, group, explorer)
            self._carry_out(self._schedule.failed(group))
        else:
            self._history.stored[group] = version, self._explorers[explorer].loaded
            self._note("ready", version, group, explorer)
            self._carry_out(self._schedule.ready(group, version, self._given.score(group)))

    def _load(self, explorer: int, version: int, alone: bool = False) -> None:
        if explorer in self._explorers:
            self._explorers[explorer].loaded = version
            self._note("loaded", version, explorer=explorer)
            self._carry_out(self._schedule.loaded(explorer, version, alone))

    def _load_newest(self, explorer: int) -> None:
        self._load(explorer, self._schedule.pushed_version)

    # The trainer

    def _next_job(self) -> None:
        """Has an idle trainer begin what it does next: explorers that wait for weights come first."""
        if self._busy:
            return
        version = self._schedule.version
        while self._late:
            explorer = self._late.popleft()
            if explorer in self._explorers and self._explorers[explorer].loaded < version:  # no push has reached it
                self._note("loading", version, explorer=explorer)
                self._work(self._given.push_time, partial(self._load, explorer, version, alone=True))
                return
        if self._job is not None:
            job, self._job = self._job, None
            job()

    def _work(self, seconds: float, then: Callable[[], None]) -> None:
        def end() -> None:
            then()
            self._busy = False
            self._next_job()

        self._busy = True
        self._clock.after(seconds, end)

    def _train(self, lease: Lease) -> None:
        self._note("training", lease.batch, groups=lease.groups)
        self._work(self._given.train_time, partial(self._trained, lease))

    def _trained(self, lease: Lease) -> None:
        self._note("trained", lease.batch, groups=lease.groups)
        self._carry_out(self._schedule.trained(lease.batch))
        if not self._schedule.push_pending:
            self._continue()

    def _continue(self) -> None:
        """Takes a checkpoint and asks for the next batch; after the last one the last version is pushed."""
        version, batches = self._schedule.version, self._given.batches
        self._history.checkpoints[version] = self._schedule.order.progress
        if version < batches:
            self._carry_out(self._schedule.wanted(version))
        elif max([self._schedule.pushed_version, *self._background]) < batches:
            self._push(batches)

    def _push(self, version: int) -> None:
        if self._rule.asynchronous:
            self._background.append(version)
            self._clock.after(self._given.push_time, partial(self._pushed_in_background, version))
        else:
            self._job = partial(self._push_now, version)
            self._next_job()

    def _pushed_in_background(self, version: int) -> None:
        self._background.remove(version)
        if version > self._schedule.pushed_version:
            self._pushed(version)

    def _push_now(self, version: int) -> None:
        self._work(self._given.push_time, partial(self._push_to, sorted(self._explorers), version))

    def _push_to(self, explorers: Sequence[int], version: int) -> None:
        for explorer in explorers:
            self._load(explorer, version)
        self._pushed(version)
        self._continue()

    def _pushed(self, version: int) -> None:
        self._note("pushed", version)
        self._carry_out(self._schedule.pushed(version))
