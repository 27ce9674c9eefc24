"""The real schedule of a strategy, driven with a fake clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_rft.experience import GroupKey
from lightning_rft.simulation.events import Crash, Event
from lightning_rft.simulation.run import Circumstances, History, Run
from lightning_rft.sync.schedule import Rule

__all__ = ["drive"]


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
    load_time: float = 0.0,
    fails: Callable[[GroupKey, int], bool] = lambda group, attempt: False,
    deaths: Sequence[tuple[float, int]] = (),
    joins: Sequence[tuple[float, int]] = (),
    crashes: Sequence[Crash] = (),
    capacity: int | None = None,
    room: int | None = None,
    score: Callable[[GroupKey], float] = lambda group: 0.0,
    keeps: bool = False,
) -> list[Event]:
    """Runs the real schedule of a strategy with a fake clock: no process, no tensor, no waiting.

    Explorers run as many samples at once as they have room for; the others wait in their queues, as in an engine. The
    trainer waits for a batch, trains it and, where a push is due, waits until that may happen, or leaves it to the
    background. Where it waits for pushes, it brings weights to an explorer that comes late between two steps, or while
    it waits.

    Args:
        rule: The strategy, or any other :class:`~lightning_rft.sync.schedule.Rule`.
        batches: Batches to train.
        groups_per_batch: Groups of every batch, or a function of the batch.
        explorers: Number of explorers at the start of every run, numbered from 0.
        samples: Samples of a group.
        duration: Seconds to sample each sample of a group, all alike or one by one, at the first, second, ... attempt
            (counted from 0).
        score_time: Seconds from the end of a group's last sample until the group comes back.
        train_time: Seconds to train a batch.
        push_time: Seconds to push a version, and for an explorer that loads by itself to load it.
        load_time: Seconds in which such an explorer loads and samples nothing; 0 has it sample while it loads.
        fails: Whether that attempt at a group ends in an error instead of experience.
        deaths: When which explorer dies; ignored for one that is not there.
        joins: When which explorer joins; ignored for one that was there before, as a replacement has a new index.
        crashes: When the trainer dies.
        capacity: Maximum groups that are issued and not yet trained.
        room: Maximum samples that one explorer works on at the same time.
        score: Score of a group, for strategies that train the highest first.
        keeps: Whether others go on with what a dead explorer has sampled.

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
    given = Circumstances(
        batches=batches,
        size=groups_per_batch if callable(groups_per_batch) else lambda batch: groups_per_batch,
        explorers=explorers,
        samples=samples,
        duration=duration,
        score_time=score_time,
        train_time=train_time,
        push_time=push_time,
        load_time=load_time,
        fails=fails,
        deaths=deaths,
        joins=joins,
        capacity=capacity,
        room=room,
        score=score,
        keeps=keeps,
    )
    history = History()
    run = Run(rule, given, history)
    for crash in sorted(crashes, key=lambda crash: crash.time):
        if run.ends_before(crash.time):
            return history.events
        rule = crash.rule or rule
        progress, ready = history.rewind(crash.back, rule.max_staleness)
        history.events.append(Event(crash.time, "resumed", progress.version, groups=tuple(sorted(ready))))
        run = Run(rule, given, history, now=crash.time, progress=progress, ready=ready)
    run.ends_before()
    return history.events
