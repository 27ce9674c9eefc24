"""Choice of the groups to train: filters, priorities and replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import pvariance
from typing import Literal

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group, GroupKey

__all__ = ["Filter", "Priority", "Replay", "ReplayMemory", "has_signal", "recency", "reward_variance"]


def has_signal(group: Group) -> bool:
    """Whether the rewards of a group differ; if not, group-relative advantages are all zero.

    ``Buffer(group_filter=has_signal)`` is the dynamic sampling of DAPO
    (`Yu et al. 2025 <https://arxiv.org/abs/2503.14476>`_): every group of a batch has a gradient.

    Args:
        group: A complete group.

    Returns:
        True if at least two of its rewards differ.

    Example:
        >>> from lightning_rft.experience import Experience, GroupKey
        >>> def group(*rewards):
        ...     return Group(GroupKey(0, 0), "7", tuple(Experience("7", i, (), r) for i, r in enumerate(rewards)))
        >>> has_signal(group(0.0, 1.0, 0.0)), has_signal(group(1.0, 1.0, 1.0))
        (True, False)
    """
    return len({experience.reward for experience in group.experiences}) > 1


class Filter:
    """Applies a ``group_filter`` (None keeps everything), and ends a run in which it refuses nearly everything."""

    def __init__(self, keep: Callable[[Group], object] | None, max_refused: int) -> None:
        #: Groups refused so far.
        self.refused = 0
        self._keep = keep
        self._max_refused = max_refused
        self._in_a_row = 0  # samples that were refused
        self._judged = 0  # groups
        self._reported = 0, 0  # refused and judged at the last share()

    def keeps(self, group: Group) -> bool:
        """Whether to train a group."""
        return self._keep is None or bool(self._keep(group))

    def count(self, group: Group, kept: bool) -> None:
        """Counts a group; ConfigurationError if too many samples in a row were refused."""
        self._judged += 1
        self._in_a_row = 0 if kept else self._in_a_row + len(group.experiences)
        self.refused += not kept
        if self._in_a_row > self._max_refused:
            raise ConfigurationError(
                f"group_filter refused {self._in_a_row} samples in a row, more than Buffer(max_refused="
                f"{self._max_refused}), the last of task {group.task_id!r}: give tasks that the policy solves now and "
                "then (more samples_per_task or a higher temperature help a little), a group_filter that keeps more, "
                "or a higher max_refused"
            )

    def share(self) -> float:
        """Share of groups refused since the last call."""
        refused, judged = self._reported
        self._reported = self.refused, self._judged
        return (self.refused - refused) / max(1, self._judged - judged)


def reward_variance(group: Group) -> float:
    """Score for :class:`Priority`: variance of the rewards, highest for tasks that are solved half the time.

    Example:
        >>> from lightning_rft.experience import Experience, GroupKey
        >>> reward_variance(Group(GroupKey(0, 0), "7", (Experience("7", 0, (), 0.0), Experience("7", 1, (), 1.0))))
        0.25
    """
    return pvariance([experience.reward for experience in group.experiences])


def recency(group: Group) -> float:
    """Score for :class:`Priority`: groups of the newest weights, nearest to on-policy, come first.

    Args:
        group: A complete group.

    Returns:
        The version that sampled its oldest token.
    """
    return float(group.oldest_version)


_SCORES: dict[str, Callable[[Group], float]] = {"reward_variance": reward_variance, "recency": recency}


class Priority:
    """Trains the groups with the highest scores first, under an asynchronous strategy.

    Groups that would be too old after a step are trained in it regardless of their score. Explorers that keep up with
    the trainer explore everything as early as they may, which leaves no choice: it is due in the order of issue. So set
    ``Buffer.capacity``, for example to half of ``max_staleness * tasks_per_step``.

    Args:
        score: ``"reward_variance"``, ``"recency"``, or a function of a finished group that returns a finite number. It
            is called once per group, in the trainer's process, and should be quick.

    Raises:
        ConfigurationError: ``score`` is neither.

    Example::

        buffer = Buffer(selection=Priority("reward_variance"), capacity=32)
        data = RFTDataModule(tasks=tasks, reward=reward, tasks_per_step=8, buffer=buffer)
        trainer = L.Trainer(max_steps=100, callbacks=[FullyAsynchronous(max_staleness=8)])
    """

    def __init__(self, score: Literal["reward_variance", "recency"] | Callable[[Group], float]) -> None:
        found = _SCORES.get(score) if isinstance(score, str) else score
        if not callable(found):
            names = " or ".join(map(repr, _SCORES))
            raise ConfigurationError(f"Priority(score={score!r}): give {names}, or a function `score(group) -> float`")
        self.score = score
        self._function = found

    def __call__(self, group: Group) -> float:
        """Returns the score of a group; ConfigurationError if it is not a finite number."""
        score = self._function(group)
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            name = getattr(self._function, "__qualname__", repr(self._function))
            raise ConfigurationError(
                f"Priority(score={name}) returned {score!r} for task {group.task_id!r}: return a finite number"
            )
        return number

    def check(self, strategy: str, asynchronous: bool) -> None:
        """Raises ConfigurationError under a strategy that trains groups in the order of issue."""
        if not asynchronous:
            raise ConfigurationError(
                f"selection=Priority(...) has nothing to choose under {strategy}, which trains groups in the order in "
                "which they were issued: take FullyAsynchronous or MultiExplorerAsynchronous, or leave selection out"
            )


class Replay:
    """Trains groups more than once: adds to each batch some that were trained before.

    Those are groups that were trained fewer than ``times`` times and are within the strategy's ``max_staleness``, the
    newest first; importance ratios correct for their age. They are kept in memory, and lost on a resume. Groups that
    are already as old as allowed when they are first trained cannot be replayed: set ``Buffer.capacity`` under an
    asynchronous strategy.

    Args:
        times: Maximum trainings of a group, the first included; at least 2.
        groups: Maximum replayed groups per batch; left out, half of ``tasks_per_step``, and at least 1.

    Raises:
        ConfigurationError: ``times`` is below 2, or ``groups`` below 1.

    Example::

        buffer = Buffer(replay=Replay(times=2), capacity=16)
        data = RFTDataModule(tasks=tasks, reward=reward, tasks_per_step=8, buffer=buffer)
        trainer = L.Trainer(max_steps=100, callbacks=[FullyAsynchronous(max_staleness=4)])
    """

    def __init__(self, times: int = 2, groups: int | None = None) -> None:
        if times < 2:
            raise ConfigurationError(f"Replay(times={times}) must be at least 2: it counts the first training too")
        if groups is not None and groups < 1:
            raise ConfigurationError(f"Replay(groups={groups}) must be at least 1")
        self.times = times
        self.groups = groups

    def check(self, strategy: str, max_staleness: int) -> None:
        """Raises ConfigurationError under a strategy whose bound leaves nothing to replay."""
        if max_staleness < 1:
            raise ConfigurationError(
                f"replay=Replay(...) can never happen under {strategy}: a group of version b that was trained in batch "
                f"b is (b + 1) - b = 1 batch old in the next one, above max_staleness={max_staleness}. Take a strategy "
                "that allows 1 or more, or leave replay out"
            )


class ReplayMemory:
    """The groups of a run that may be trained again."""

    def __init__(self, replay: Replay | None, tasks_per_step: int, max_staleness: int) -> None:
        #: Groups replayed in the last batch.
        self.replayed = 0
        self._times = 1 if replay is None else replay.times
        self._at_most = 0 if replay is None else replay.groups or max(1, tasks_per_step // 2)
        self._max_staleness = max_staleness
        self._trainings: dict[GroupKey, tuple[Group, int]] = {}  # of those that may still be trained again

    def chosen(self, batch: int) -> list[Group]:
        """The groups to replay in a batch: those of the newest weights."""
        able = [group for group, _ in self._trainings.values() if group.is_fresh(batch, self._max_staleness)]
        return sorted(able, key=lambda group: (-group.oldest_version, group.key))[: self._at_most]

    def trained(self, batch: int, fresh: Sequence[Group]) -> None:
        """Counts a batch: its fresh groups and those that it replayed."""
        again = self.chosen(batch)
        self.replayed = len(again)
        for group in [*fresh, *again]:
            _, before = self._trainings.get(group.key, (group, 0))
            self._trainings[group.key] = group, before + 1
        self._trainings = {
            key: (group, trainings)
            for key, (group, trainings) in self._trainings.items()
            if trainings < self._times and group.is_fresh(batch + 1, self._max_staleness)
        }
