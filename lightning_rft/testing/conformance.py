"""The rules that hold for every strategy, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from lightning_rft.errors import ScheduleError
from lightning_rft.experience import GroupKey
from lightning_rft.sync.schedule import Rule
from lightning_rft.testing.driver import Crash, Event, drive

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
    and one after another if ``staggered``. After a change of the strategy, what the one before had explored or trained
    ahead may be dropped, or be trained with another batch.

    Args:
        rule: The strategy.
        events: What happened.
        batches: As they were given to :func:`drive`, like the next two.
        groups_per_batch: Groups of every batch, or a function of the batch.
        crashes: When the trainer died.

    Raises:
        ScheduleError: A rule is broken; the message says which, and where.
    """

    def must(holds: bool, what: str, event: Event) -> None:
        if not holds:
            raise ScheduleError(f"{type(rule).__name__}: {what}: {event}")

    def groups_before(stop: int) -> list[GroupKey]:
        return [GroupKey(batch, slot) for batch in range(stop) for slot in range(size(batch))]

    size = groups_per_batch if callable(groups_per_batch) else lambda batch: groups_per_batch
    resumes = iter(sorted(crashes, key=lambda crash: crash.time))
    version_of: dict[GroupKey, int] = {}
    steps: list[tuple[GroupKey, ...]] = []  # of the lineage so far
    loading: set[int] = set()
    working: dict[GroupKey, int] = {}
    pushed, kept, changed, straight = -1, set[GroupKey](), False, True
    for event in events:
        if event.what == "resumed":
            crash = next(resumes)
            rule, changed = crash.rule or rule, changed or crash.rule is not None
            must(event.version <= len(steps), "goes on from a version that was not trained", event)
            del steps[event.version :]
            trained = {group for groups in steps for group in groups}
            kept, straight = set(event.groups), trained == set(groups_before(event.version))
            must(not kept & trained, "goes on with groups that are trained", event)
            version_of = {group: version for group, version in version_of.items() if group in kept | trained}
            for group in kept:
                age = event.version - version_of[group]
                must(0 <= age <= rule.max_staleness, f"goes on with {group}, which is {age} batches old", event)
            loading, working, pushed = set(), {}, event.version - 1
        if event.group is not None and event.explorer is not None:
            if event.what == "issued":
                must(event.explorer not in loading, "was given to an explorer that loads", event)
                must(event.group not in working, "was given to two explorers", event)
                working[event.group] = event.explorer
            elif event.what == "ended":
                must(working.get(event.group) == event.explorer, "a sample of another explorer's group ended", event)
            else:
                working.pop(event.group)
        if event.group is not None and event.what == "issued":
            admitted = event.version >= rule.admit(event.group.batch) or (changed and event.group in kept)
            must(admitted, "began with weights older than admitted", event)
        if event.group is not None and event.what == "ready":
            version_of[event.group] = event.version
        if event.what == "dropped":
            must(rule.overdue == "drop" or (changed and event.group in kept), "dropped, though a step waits", event)
        if event.what == "training":
            must(event.version == len(steps), f"trained instead of batch {len(steps)}", event)
            must(len(event.groups) == size(event.version), f"not the {size(event.version)} groups of the batch", event)
            for group in event.groups:
                age = event.version - version_of.get(group, event.version + 1)
                must(age >= 0, f"{group} was never explored, or with weights from the future", event)
                must(age <= rule.max_staleness, f"{group} is {age} batches old", event)
                in_order = group.batch == event.version if straight else group.batch <= event.version
                must(rule.asynchronous or in_order, f"{group} is of another batch", event)
            steps.append(event.groups)
        if event.what == "pushed":
            must(event.version > pushed, f"pushed after {pushed}", event)
            must(event.version <= len(steps), "pushed before it was trained", event)
            pushed = event.version
        if event.explorer is not None and event.what == "loading":
            must(not (rule.staggered and loading), f"loads while {sorted(loading)} does", event)
            loading.add(event.explorer)
        if event.explorer is not None and event.what in ("loading", "loaded"):
            must(rule.in_flight or event.explorer not in working.values(), "loads while it works", event)
        if event.explorer is not None and event.what in ("loaded", "died"):
            loading.discard(event.explorer)
            if event.what == "died":
                working = {group: explorer for group, explorer in working.items() if explorer != event.explorer}
    last = events[-1]
    must(len(steps) == batches and pushed == batches, f"ended after {len(steps)} batches, with {pushed} pushed", last)
    everything = sorted(group for groups in steps for group in groups)
    must(everything == groups_before(batches), "some group was lost, or trained twice", last)


def check_strategy(rule: Rule, *, runs: int = 200, seed: int = 0) -> None:
    """The conformance test of a strategy: runs its schedule under many random circumstances and checks the rules.

    Samples take heavy-tailed times, groups fail, explorers die and others take their place, the trainer dies and goes
    on from a checkpoint, batches are short, room is scarce, and scores say which groups are to be trained first.

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
    for _ in range(runs):
        size = random.randint(1, 4)
        sizes = {5: random.randint(1, size)}  # a short batch somewhere
        batches = random.randint(1, 12)
        explorers = random.randint(2 if rule.staggered else 1, 3)
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
        )
        check_events(rule, events, batches=batches, groups_per_batch=groups, crashes=crashes)
