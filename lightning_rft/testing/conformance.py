"""The rules that hold for every strategy, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from lightning_rft.errors import ScheduleError
from lightning_rft.experience import GroupKey
from lightning_rft.simulation.driver import drive
from lightning_rft.simulation.events import Crash, Event
from lightning_rft.sync.schedule import Rule

__all__ = ["check_events", "check_strategy"]


def check_events(
    rule: Rule,
    events: Sequence[Event],
    *,
    batches: int,
    groups_per_batch: int | Callable[[int], int] = 1,
    crashes: Sequence[Crash] = (),
) -> None:
    """Checks what happened under :func:`drive` against the rules that hold for every strategy.

    Every batch is trained once and in order, with as many groups as it has; every group is trained once, in the
    lineage of the final weights; no group began with weights older than ``admit``; nothing is staler than
    ``max_staleness``, nor from the future; versions are pushed in order, the last one included; strategies that train
    in order do so; nothing is dropped unless ``overdue="drop"``; explorers load between groups unless ``in_flight``,
    and no larger share of them than ``loading`` at the same time, but one. After a change of the strategy, what the one
    before had explored or trained ahead may be dropped, or be trained with another batch.

    Args:
        rule: The strategy.
        events: What happened.
        batches: As they were given to :func:`drive`, like the next two.
        groups_per_batch: Groups of every batch, or a function of the batch.
        crashes: When the trainer died.

    Raises:
        ScheduleError: A rule is broken; the message says which, and where.
    """
    size = groups_per_batch if callable(groups_per_batch) else lambda batch: groups_per_batch
    witness = _Witness(rule, size, crashes)
    for event in events:
        witness.see(event)
    witness.ends(batches)


def check_strategy(rule: Rule, *, runs: int = 200, seed: int = 0) -> None:
    """The conformance test of a strategy: runs its schedule under many random circumstances and checks the rules.

    Samples take heavy-tailed times, groups fail, explorers die and others take their place, the trainer dies and
    resumes from a checkpoint, batches are short, room is scarce, and scores say which groups are to be trained first.

    Args:
        rule: The strategy.
        runs: How many circumstances.
        seed: Of those.

    Raises:
        ConfigurationError: The strategy can never work; the message has the arithmetic.
        ScheduleError: A rule is broken, or nothing can happen any more.

    Example:
        >>> from lightning_rft import OneStepOffPolicy
        >>> check_strategy(OneStepOffPolicy(sync_interval=2), runs=10)
    """
    random = Random(seed)
    for number in range(runs):
        size = random.randint(1, 4)
        sizes = {5: random.randint(1, size)}  # a short batch somewhere
        batches = random.randint(1, 12)
        explorers = random.randint(1, 3) if rule.loading >= 1 else random.choice([2, 3, 9])
        lengths = Random(random.random())
        failing = random.choice([0.0, 0.2])
        samples = random.choice([1, 1, 4])

        def duration(group: GroupKey, attempt: int, lengths: Random = lengths, samples: int = samples) -> list[float]:
            return [lengths.paretovariate(1.2) for _ in range(samples)]

        def fails(group: GroupKey, attempt: int, lengths: Random = lengths, failing: float = failing) -> bool:
            return attempt < 5 and lengths.random() < failing

        def groups(batch: int, sizes: dict[int, int] = sizes, size: int = size) -> int:
            return sizes.get(batch, size)

        scored = random.choice([False, True])

        def score(group: GroupKey, seed: int = random.randrange(2**32), scored: bool = scored) -> float:
            return Random(repr((seed, group))).random() if scored else 0.0

        deaths = [(random.uniform(0, 20), explorer) for explorer in range(random.choice([0, 0, explorers + 1]))]
        joins = [(when + random.uniform(0, 5), explorers + explorer) for when, explorer in deaths]
        crashes = [Crash(random.uniform(0, 20), random.randrange(3)) for _ in range(random.choice([0, 0, 1, 2]))]
        events = drive(
            rule,
            batches=batches,
            groups_per_batch=groups,
            explorers=explorers,
            samples=samples,
            duration=duration,
            score_time=random.choice([0.0, 0.5]),
            train_time=random.choice([0.1, 1.0, 5.0]),
            push_time=random.choice([0.0, 0.1, 2.0]),
            fails=fails,
            deaths=deaths,
            joins=joins,
            crashes=crashes,
            capacity=random.choice([None, size, 2 * size]),
            room=random.choice([None, 1, 3]),
            score=score,
            keeps=number % 2 == 1,
        )
        check_events(rule, events, batches=batches, groups_per_batch=groups, crashes=crashes)


class _Witness:
    """Follows a run event by event, and objects to the first that breaks a rule."""

    def __init__(self, rule: Rule, size: Callable[[int], int], crashes: Sequence[Crash]) -> None:
        self._rule, self._size = rule, size
        self._crashes = iter(sorted(crashes, key=lambda crash: crash.time))
        self._version_of: dict[GroupKey, int] = {}  # of groups that have come back
        self._steps: list[tuple[GroupKey, ...]] = []  # of the lineage so far
        self._explorers: set[int] = set()
        self._loading: set[int] = set()
        self._working: dict[GroupKey, int] = {}  # group -> explorer
        self._pushed = -1
        self._kept: set[GroupKey] = set()  # by the last resume
        self._changed = False  # whether a resume has changed the rule
        self._straight = True  # whether the run began with whole batches trained

    def see(self, event: Event) -> None:
        self._event = event
        if event.what == "resumed":
            self._resumed(event)
        elif event.what == "training":
            self._training(event)
        elif event.what == "pushed":
            self._newly_pushed(event)
        elif event.group is not None:
            self._of_group(event, event.group)
        elif event.explorer is not None:
            self._of_explorer(event, event.explorer)

    def ends(self, batches: int) -> None:
        steps, pushed = len(self._steps), self._pushed
        self._must(steps == pushed == batches, f"ended after {steps} batches, with {pushed} pushed")
        everything = sorted(group for groups in self._steps for group in groups)
        self._must(everything == self._groups_before(batches), "some group was lost, or trained twice")

    def _must(self, holds: bool, what: str) -> None:
        if not holds:
            raise ScheduleError(f"{type(self._rule).__name__}: {what}: {self._event}")

    def _groups_before(self, stop: int) -> list[GroupKey]:
        return [GroupKey(batch, slot) for batch in range(stop) for slot in range(self._size(batch))]

    def _resumed(self, event: Event) -> None:
        crash = next(self._crashes)
        self._rule, self._changed = crash.rule or self._rule, self._changed or crash.rule is not None
        self._must(event.version <= len(self._steps), "resumes from a version that was not trained")
        del self._steps[event.version :]
        trained = {group for groups in self._steps for group in groups}
        self._kept, self._straight = set(event.groups), trained == set(self._groups_before(event.version))
        self._must(not self._kept & trained, "resumes with groups that are trained")
        self._version_of = {
            group: version for group, version in self._version_of.items() if group in self._kept | trained
        }
        for group in self._kept:
            age = event.version - self._version_of[group]
            self._must(0 <= age <= self._rule.max_staleness, f"resumes with {group}, which is {age} batches old")
        self._explorers, self._loading, self._working, self._pushed = set(), set(), {}, event.version - 1

    def _of_group(self, event: Event, group: GroupKey) -> None:
        exempt = self._changed and group in self._kept
        if event.what == "issued":
            self._must(event.explorer not in self._loading, "was given to an explorer that loads")
            self._must(group not in self._working, "was given to two explorers")
            admitted = event.version >= self._rule.admit(group.batch)
            self._must(admitted or exempt, "began with weights older than admitted")
            assert event.explorer is not None
            self._working[group] = event.explorer
        elif event.what == "ended":
            self._must(self._working.get(group) == event.explorer, "a sample of another explorer's group ended")
        elif event.explorer is not None:
            del self._working[group]
        if event.what == "ready":
            self._version_of[group] = event.version
        if event.what == "dropped":
            self._must(self._rule.overdue == "drop" or exempt, "dropped, though a step waits")

    def _training(self, event: Event) -> None:
        self._must(event.version == len(self._steps), f"trained instead of batch {len(self._steps)}")
        size = self._size(event.version)
        self._must(len(event.groups) == size, f"not the {size} groups of the batch")
        for group in event.groups:
            age = event.version - self._version_of.get(group, event.version + 1)
            self._must(age >= 0, f"{group} was never explored, or with weights from the future")
            self._must(age <= self._rule.max_staleness, f"{group} is {age} batches old")
            in_order = group.batch == event.version if self._straight else group.batch <= event.version
            self._must(self._rule.asynchronous or in_order, f"{group} is of another batch")
        self._steps.append(event.groups)

    def _newly_pushed(self, event: Event) -> None:
        self._must(event.version > self._pushed, f"pushed after {self._pushed}")
        self._must(event.version <= len(self._steps), "pushed before it was trained")
        self._pushed = event.version

    def _of_explorer(self, event: Event, explorer: int) -> None:
        if event.what == "joined":
            self._explorers.add(explorer)
        if event.what == "loading":
            most = max(1.0, self._rule.loading * len(self._explorers))
            self._must(len(self._loading) + 1 <= most, f"loads while {sorted(self._loading)} do")
            self._loading.add(explorer)
        if event.what in ("loading", "loaded"):
            self._must(self._rule.in_flight or explorer not in self._working.values(), "loads while it works")
        if event.what in ("loaded", "died"):
            self._loading.discard(explorer)
        if event.what == "died":
            self._explorers.discard(explorer)
            self._working = {group: other for group, other in self._working.items() if other != explorer}
