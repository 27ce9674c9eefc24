"""The plan: what every strategy would come to, on a fake clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_rft.experience import GroupKey
from lightning_rft.monitor.spans import Interval, union
from lightning_rft.plan.figures import Case, Figures
from lightning_rft.simulation.driver import drive
from lightning_rft.simulation.events import Event

__all__ = ["Row", "plan"]

_STEPS = 24  # that a row is the mean of, at least


@dataclass(frozen=True)
class Row:
    """What a case comes to once it runs evenly."""

    case: Case
    step_s: float  #: Seconds from one step to the next.
    trainer_idle: float  #: Share of the time in which the trainer neither trains nor pushes.
    explorer_idle: float  #: Share of the time in which an explorer neither explores nor loads; their mean.
    staleness_mean: float  #: Batches that a group's oldest token lags behind.
    staleness_max: int


def plan(figures: Figures, cases: Sequence[Case]) -> list[Row]:
    """Has every case run through the schedule that real runs have."""
    return [_row(figures, case) for case in cases]


def _row(figures: Figures, case: Case) -> Row:
    rule, groups = case.rule, figures.tasks_per_step
    interval = rule.sync_interval
    # begin and end are left out: explorers run ahead, or have nothing left
    lead = 4 * (interval + rule.max_staleness)
    first = -(-lead // interval) * interval
    last = first + -(-_STEPS // interval) * interval

    def duration(group: GroupKey, attempt: int) -> Sequence[float]:
        return figures.sample_s[(group.batch * groups + group.slot) % len(figures.sample_s)]

    events = drive(
        rule,
        batches=last + lead,
        groups_per_batch=groups,
        explorers=case.explorers,
        samples=figures.samples,
        duration=duration,
        train_time=figures.train_s,
        push_time=figures.push_s,
        load_time=figures.load_s,
        room=figures.at_once,
    )
    begins = {event.version: event.time for event in events if event.what == "training"}
    window = begins[first], begins[last]
    trainer, explorers = _at_work(events, figures, case)
    staleness = _staleness(events, range(first, last))
    return Row(
        case,
        (window[1] - window[0]) / (last - first),
        _idle(trainer, window),
        fmean(_idle(explorers[index], window) for index in range(case.explorers)),
        fmean(staleness),
        max(staleness),
    )


def _at_work(events: Iterable[Event], figures: Figures, case: Case) -> tuple[list[Interval], dict[int, list[Interval]]]:
    """When the trainer and each explorer were at work."""
    trainer: list[Interval] = []
    explorers: dict[int, list[Interval]] = defaultdict(list)
    began: dict[object, float] = {}
    for event in events:
        if event.what in ("issued", "loading", "training"):
            began[event.group or event.explorer] = event.time
        elif event.what == "trained":
            trainer.append((began[None], event.time))
        elif event.what == "ready" or (event.what == "loaded" and case.rule.asynchronous):
            assert event.explorer is not None
            explorers[event.explorer].append((began.pop(event.group or event.explorer), event.time))
        elif event.what == "pushed" and not case.rule.asynchronous:
            push = event.time - figures.push_s, event.time
            for track in (trainer, *(explorers[index] for index in range(case.explorers))):
                track.append(push)
    return trainer, explorers


def _idle(work: Iterable[Interval], window: Interval) -> float:
    begin, end = window
    busy = sum(max(0.0, min(one[1], end) - max(one[0], begin)) for one in union(work))
    return max(0.0, 1 - busy / (end - begin))


def _staleness(events: Iterable[Event], batches: range) -> list[int]:
    """How many batches every group lags behind when it is trained."""
    versions: dict[GroupKey, int] = {}
    staleness: list[int] = []
    for event in events:
        if event.what == "ready" and event.group is not None:
            versions[event.group] = event.version
        elif event.what == "training" and event.version in batches:
            staleness += [event.version - versions[group] for group in event.groups]
    return staleness
