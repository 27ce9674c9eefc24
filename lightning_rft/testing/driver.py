"""Runs the schedule of a strategy with a fake clock."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from math import inf

from lightning_rft.errors import ScheduleError
from lightning_rft.experience import GroupKey, Progress
from lightning_rft.sync.schedule import Action, Drop, Issue, Lease, Load, Push, Rule, Schedule

__all__ = ["Crash", "Event", "drive"]


@dataclass(frozen=True)
class Event:
    """Something that happened under :func:`drive`.

    Args:
        time: Seconds on the fake clock.
        what: ``"issued"``, ``"ready"``, ``"failed"`` or ``"dropped"`` (a group), ``"ended"`` (one of its samples),
            ``"joined"``, ``"loading"``, ``"loaded"`` or ``"died"`` (an explorer; ``"loading"`` only if it loads by
            itself), ``"training"`` or ``"trained"`` (a batch: its step begins or ends), ``"pushed"`` (a version, now
            loaded by every explorer or, if pushes happen in the background, about to be), ``"resumed"`` (a new run,
            which all later events are of).
        version: The version that it happened with. For a group: the one that its explorer had loaded when it was
            issued, or from then on when the first of its samples began; for ``"trained"``: the batch, which is the
            version that it is trained by.
        group: The group, if it is about one.
        explorer: The explorer, if it is about one.
        groups: Those of the batch that is trained, or those that a resumed run starts with.
    """

    time: float
    what: str
    version: int
    group: GroupKey | None = None
    explorer: int | None = None
    groups: tuple[GroupKey, ...] = ()


@dataclass(frozen=True)
class Crash:
    """The trainer dies and takes all explorers along; a new run goes on from a checkpoint.

    A checkpoint is taken after each step and its push. What explorers had brought back until the crash is used where
    its weights are part of the checkpoint and not too old.

    Args:
        time: Seconds on the fake clock.
        back: How many checkpoints before the last one the new run goes on from.
        rule: Its strategy; ``None`` for the same.
    """

    time: float
    back: int = 0
    rule: Rule | None = None


def drive(
    rule: Rule,
    *,
    batches: int,
    groups_per_batch: int | Callable[[int], int] = 1,
    explorers: int = 1,
    samples: int = 1,
    duration: Callable[[GroupKey, int], float | Sequence[float]] = lambda group, attempt: 1.0,
    score_time: float = 0.0,
    train_time: float = 1.0,
    push_time: float = 0.0,
    fails: Callable[[GroupKey, int], bool] = lambda group, attempt: False,
    deaths: Sequence[tuple[float, int]] = (),
    joins: Sequence[tuple[float, int]] = (),
    crashes: Sequence[Crash] = (),
    capacity: int | None = None,
    room: int | None = None,
    score: Callable[[GroupKey], float] = lambda group: 0.0,
) -> list[Event]:
    """Runs the real schedule of a strategy with a fake clock: no process, no tensor, no waiting.

    Explorers sample as many samples at once as they have room for; those of a group that are more wait in their queues,
    as in an engine. The trainer does what
    :class:`~lightning_rft.sync.strategy.SyncStrategy` does: it waits for a batch, trains it and, where a push is due,
    waits until that may happen, or leaves it to the background. Where it waits for pushes, it brings weights to an
    explorer that comes late between two steps, or while it waits.

    Args:
        rule: The strategy, or any other :class:`~lightning_rft.sync.schedule.Rule`.
        batches: Batches to train.
        groups_per_batch: Groups of every batch, or a function of the batch.
        explorers: Number of explorers, 0 and up, that are there from the start of every run: 0, 1, ...
        samples: Samples of a group.
        duration: Seconds to sample each sample of a group, all alike or one by one, at the first, second, ... attempt
            (counted from 0).
        score_time: Seconds from the end of a group's last sample until the group comes back.
        train_time: Seconds to train a batch.
        push_time: Seconds to push a version, and for an explorer that loads by itself to load it.
        fails: Whether that attempt at a group ends in an error instead of experience.
        deaths: When which explorer dies; moot for one that is not there.
        joins: When which explorer comes; moot for one that was there before, since one that comes back has a new index.
        crashes: When the trainer dies.
        capacity: Most groups that may be issued and not yet trained.
        room: Most samples that one explorer works on at the same time.
        score: Score of a group, for strategies that train the highest first.

    Returns:
        What happened, in order.

    Raises:
        ScheduleError: Nothing can happen any more, and not every batch was trained: a deadlock.

    Example:
        >>> from lightning_rft import Synchronous
        >>> events = drive(Synchronous(sync_interval=2), batches=2, push_time=0.5)
        >>> [(event.time, event.what, event.version) for event in events if event.what in ("pushed", "trained")]
        [(0.5, 'pushed', 0), (2.5, 'trained', 0), (3.5, 'trained', 1), (4.0, 'pushed', 2)]
    """
    driver = _Driver(
        rule,
        batches=batches,
        size=groups_per_batch if callable(groups_per_batch) else lambda batch: groups_per_batch,
        explorers=explorers,
        samples=samples,
        duration=duration,
        score_time=score_time,
        train_time=train_time,
        push_time=push_time,
        fails=fails,
        deaths=deaths,
        joins=joins,
        capacity=capacity,
        room=room,
        score=score,
    )
    driver.begin(Progress(0), {})
    for crash in sorted(crashes, key=lambda crash: crash.time):
        if driver.run(until=crash.time):
            break
        driver.resume(crash)
    else:
        driver.run()
    return driver.events


@dataclass(eq=False)
class _Work:
    """A group that an explorer works on."""

    group: GroupKey
    explorer: int
    attempt: int
    version: int  # that was loaded when it was issued, then when its first sample began
    waiting: int  # samples
    left: int  # samples that have not ended


@dataclass
class _Driver:
    """One run after another. What is declared last lasts; :meth:`begin` makes what belongs to one run."""

    rule: Rule
    batches: int
    size: Callable[[int], int]
    explorers: int
    samples: int
    duration: Callable[[GroupKey, int], float | Sequence[float]]
    score_time: float
    train_time: float
    push_time: float
    fails: Callable[[GroupKey, int], bool]
    deaths: Sequence[tuple[float, int]]
    joins: Sequence[tuple[float, int]]
    capacity: int | None
    room: int | None
    score: Callable[[GroupKey], float]

    now: float = 0.0
    events: list[Event] = field(default_factory=list)
    attempts: Counter[GroupKey] = field(default_factory=Counter)
    stored: dict[GroupKey, tuple[int, int]] = field(default_factory=dict)  # oldest and newest version
    checkpoints: dict[int, Progress] = field(default_factory=lambda: {0: Progress(0)})

    def begin(self, progress: Progress, ready: dict[GroupKey, int]) -> None:
        """Starts a run."""
        self.schedule = Schedule(
            self.rule,
            size=self.size,
            samples=self.samples,
            stop=self.batches,
            capacity=self.capacity,
            progress=progress,
            ready=ready,
            scores={group: self.score(group) for group in ready},
        )
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.order = count()
        self.loaded: dict[int, int] = {}  # explorer -> version
        self.known: set[int] = set()  # explorers, the dead ones too
        self.running: dict[GroupKey, _Work] = {}
        self.queues: dict[int, deque[tuple[_Work, float]]] = {}  # explorer -> samples that wait, with their lengths
        self.sampling: dict[int, list[_Work]] = {}  # explorer -> the groups of the samples that run
        self.background: list[int] = []  # versions that are on their way to be loadable
        self.busy = False  # the trainer: it trains, pushes, or brings weights to one explorer
        self.late: deque[int] = deque()  # explorers that wait for that
        self.job: Callable[[], None] | None = None  # what the trainer does next
        for explorer in range(self.explorers):
            self.join(explorer)
        for when, explorer in self.deaths:
            self.at(when, partial(self.die, explorer))
        for when, explorer in self.joins:
            self.at(when, partial(self.join, explorer))
        self.push(progress.version)
        if self.rule.asynchronous:
            self.go_on()

    def run(self, until: float = inf) -> bool:
        """Lets everything happen that does before ``until``; returns whether all batches are trained."""
        while self.schedule.pushed_version < self.batches:
            if not self.agenda:
                raise ScheduleError(
                    f"deadlock: {self.schedule.version} of {self.batches} batches are trained, version "
                    f"{self.schedule.pushed_version} was pushed last, and nothing can happen any more; explorers "
                    f"have loaded {self.loaded}"
                )
            if self.agenda[0][0] >= until:
                self.now = until
                return False
            self.now, _, happen = heapq.heappop(self.agenda)
            happen()
        return True

    def resume(self, crash: Crash) -> None:
        """Starts another run from a checkpoint of this one."""
        saved = sorted(self.checkpoints)
        version = saved[max(0, len(saved) - 1 - crash.back)]
        progress = self.checkpoints[version]
        self.rule = crash.rule or self.rule
        ready = {
            group: oldest
            for group, (oldest, newest) in self.stored.items()
            if not progress.trained(group) and version - self.rule.max_staleness <= oldest and newest <= version
        }
        self.stored = {
            group: versions for group, versions in self.stored.items() if group in ready or progress.trained(group)
        }
        self.checkpoints = {number: saved for number, saved in self.checkpoints.items() if number <= version}
        self.events.append(Event(self.now, "resumed", version, groups=tuple(sorted(ready))))
        self.begin(progress, ready)

    # The clock

    def at(self, time: float, happen: Callable[[], None]) -> None:
        if time >= self.now:  # else it was in an earlier run
            heapq.heappush(self.agenda, (time, next(self.order), happen))

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        self.at(self.now + seconds, happen)

    def note(self, what: str, version: int, group: GroupKey | None = None, explorer: int | None = None) -> None:
        self.events.append(Event(self.now, what, version, group, explorer))

    def carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Issue):
                self.issue(action.group, action.explorer)
            elif isinstance(action, Lease):
                self.job = partial(self.train, action)
            elif isinstance(action, Push):
                self.push(action.version)
            elif isinstance(action, Load) and self.rule.asynchronous:
                self.note("loading", action.version, explorer=action.explorer)
                self.after(self.push_time, partial(self.load_newest, action.explorer))
            elif isinstance(action, Load):
                self.late.append(action.explorer)
            elif isinstance(action, Drop):
                self.stored.pop(action.group, None)
                work = self.running.pop(action.group, None)
                self.note("dropped", -1 if work is None else work.version, action.group, action.explorer)
                if work is not None:
                    self.forget(work)
        self.turn()

    # Explorers

    def join(self, explorer: int) -> None:
        if explorer not in self.known:
            self.known.add(explorer)
            self.loaded[explorer] = -1
            self.queues[explorer], self.sampling[explorer] = deque(), []
            self.note("joined", -1, explorer=explorer)
            self.carry_out(self.schedule.joined(explorer, self.room))

    def die(self, explorer: int) -> None:
        if explorer in self.loaded:
            self.note("died", self.loaded.pop(explorer), explorer=explorer)
            self.running = {group: work for group, work in self.running.items() if work.explorer != explorer}
            self.carry_out(self.schedule.died(explorer))

    def issue(self, group: GroupKey, explorer: int) -> None:
        attempt, version = self.attempts[group], self.loaded[explorer]
        self.attempts[group] += 1
        work = self.running[group] = _Work(group, explorer, attempt, version, self.samples, self.samples)
        self.note("issued", version, group, explorer)
        length = self.duration(group, attempt)
        lengths = [length] * self.samples if isinstance(length, int | float) else length
        self.queues[explorer] += [(work, seconds) for seconds in lengths]
        self.sample(explorer)

    def sample(self, explorer: int) -> None:
        queue, sampling = self.queues[explorer], self.sampling[explorer]
        while queue and (self.room is None or len(sampling) < self.room):
            work, seconds = queue.popleft()
            sampling.append(work)
            if work.waiting == self.samples:
                work.version = self.loaded[explorer]
            work.waiting -= 1
            self.after(seconds, partial(self.end, work))

    def end(self, work: _Work) -> None:
        if self.running.get(work.group) is not work:
            return  # its explorer died, or it was dropped
        self.sampling[work.explorer].remove(work)
        self.sample(work.explorer)
        work.left -= 1
        self.note("ended", work.version, work.group, work.explorer)
        if not work.left:
            self.after(self.score_time, partial(self.finish, work))
        self.carry_out(self.schedule.samples_ended({work.group: 1}))

    def forget(self, work: _Work) -> None:
        queue = self.queues[work.explorer]
        self.queues[work.explorer] = deque((other, seconds) for other, seconds in queue if other is not work)
        self.sampling[work.explorer] = [other for other in self.sampling[work.explorer] if other is not work]
        self.sample(work.explorer)

    def finish(self, work: _Work) -> None:
        if self.running.get(work.group) is not work:
            return
        group, explorer, version = work.group, work.explorer, work.version
        del self.running[group]
        if self.fails(group, work.attempt):
            self.note("failed", version, group, explorer)
            self.carry_out(self.schedule.failed(group))
        else:
            self.stored[group] = version, self.loaded[explorer]
            self.note("ready", version, group, explorer)
            self.carry_out(self.schedule.ready(group, version, self.score(group)))

    def load(self, explorer: int, version: int, alone: bool = False) -> None:
        if explorer in self.loaded:
            self.loaded[explorer] = version
            self.note("loaded", version, explorer=explorer)
            self.carry_out(self.schedule.loaded(explorer, version, alone))

    def load_newest(self, explorer: int) -> None:
        self.load(explorer, self.schedule.pushed_version)

    # The trainer

    def turn(self) -> None:
        """Begins what the trainer does next, if it has nothing to do: explorers that wait for weights come first."""
        if self.busy:
            return
        version = self.schedule.version
        while self.late:
            explorer = self.late.popleft()
            if self.loaded.get(explorer, version) < version:  # it lives, and no push has reached it meanwhile
                self.note("loading", version, explorer=explorer)
                self.work(self.push_time, partial(self.load, explorer, version, alone=True))
                return
        if self.job is not None:
            job, self.job = self.job, None
            job()

    def work(self, seconds: float, then: Callable[[], None]) -> None:
        def end() -> None:
            then()
            self.busy = False
            self.turn()

        self.busy = True
        self.after(seconds, end)

    def train(self, lease: Lease) -> None:
        self.events.append(Event(self.now, "training", lease.batch, groups=lease.groups))
        self.work(self.train_time, partial(self.trained, lease))

    def trained(self, lease: Lease) -> None:
        self.events.append(Event(self.now, "trained", lease.batch, groups=lease.groups))
        self.carry_out(self.schedule.trained(lease.batch))
        if not self.schedule.push_pending:
            self.go_on()

    def go_on(self) -> None:
        self.checkpoints[self.schedule.version] = self.schedule.progress
        if self.schedule.version < self.batches:
            self.carry_out(self.schedule.wanted(self.schedule.version))
        elif max([self.schedule.pushed_version, *self.background]) < self.batches:
            self.push(self.batches)

    def push(self, version: int) -> None:
        if self.rule.asynchronous:
            self.background.append(version)
            self.after(self.push_time, partial(self.pushed, version))
        else:
            self.job = partial(self.push_now, version)
            self.turn()

    def pushed(self, version: int) -> None:
        self.background.remove(version)
        if version > self.schedule.pushed_version:
            self.note("pushed", version)
            self.carry_out(self.schedule.pushed(version))

    def push_now(self, version: int) -> None:
        self.work(self.push_time, partial(self.push_to, sorted(self.loaded), version))

    def push_to(self, explorers: Sequence[int], version: int) -> None:
        for explorer in explorers:
            self.load(explorer, version)
        self.note("pushed", version)
        self.carry_out(self.schedule.pushed(version))
        self.go_on()
