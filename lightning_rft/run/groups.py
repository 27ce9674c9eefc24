"""The account of a run's groups, from issue to training, which keeps buffer, tasks and filters in step."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rft.buffer.ledger import Ledger
from lightning_rft.buffer.selection import Filter, ReplayMemory
from lightning_rft.errors import ScheduleError
from lightning_rft.experience import Group, GroupKey, Progress
from lightning_rft.explorer.messages import Explore, Explored
from lightning_rft.run.partials import Partials
from lightning_rft.run.resume import run_state
from lightning_rft.run.validation import Validation
from lightning_rft.settings import Buffer, Sampling
from lightning_rft.tasks.plan import TaskCursor

__all__ = ["Groups", "Judged"]

_log = logging.getLogger(__name__)

_REFUSALS = 3  # of one group: more are no coincidence
_DEATHS = 2  # of explorers with the same group, which may be what kills them


@dataclass(frozen=True)
class Judged:
    """A group of the samples that succeeded, and what the user's functions say of it."""

    group: Group
    failure: str = ""  #: Why the group failed, if it did.
    kept: bool = True
    score: float = 0.0

    @property
    def oldest(self) -> int | None:
        """The version of its oldest token, if it has any."""
        return self.group.oldest_version if self.group.experiences else None


class Groups:
    """Keeps the account of every group; only :meth:`judged` is thread-safe.

    Explorers' answers carry the ``incarnation``. A group with fewer than ``min_samples`` successful samples has failed.
    """

    def __init__(
        self,
        ledger: Ledger,
        cursor: TaskCursor,
        buffer: Buffer,
        *,
        incarnation: int,
        samples_per_task: int,
        min_samples: int,
        sampling: Sampling,
        max_staleness: int,
    ) -> None:
        self.incarnation = incarnation
        self.samples_per_task = samples_per_task
        #: The batch that is being trained, or is next.
        self.leased: list[Group] | None = None
        self._ledger = ledger
        self._cursor = cursor
        self._min_samples = min_samples
        self._sampling = sampling
        self._max_staleness = max_staleness
        self._filter = Filter(buffer.group_filter, buffer.max_refused)
        self._score = buffer.selection
        self._replay = ReplayMemory(buffer.replay, cursor.plan.tasks_per_step, max_staleness)
        self._keep = buffer.keep
        self._dropped = self._failed = 0
        self._attempts: Counter[GroupKey] = Counter()
        self._refusals: Counter[GroupKey] = Counter()
        self._deaths: Counter[GroupKey] = Counter()
        #: What samples that are still explored have sampled.
        self.partials = Partials()

    # While a group is explored

    def issue(self, issues: Sequence[tuple[GroupKey, int]]) -> list[tuple[Explore, int]]:
        """Records which explorers get which groups; returns the message to each."""
        with self._ledger.together():
            for key, explorer in issues:
                self._ledger.issue(key, self._cursor.task(key).id, self._cursor.epoch(key), explorer)
        return [(self._asks(key), explorer) for key, explorer in issues]

    def _asks(self, key: GroupKey) -> Explore:
        seeds = tuple(self._cursor.sample_seed(key, sample) for sample in range(self.samples_per_task))
        self._attempts[key] += 1
        kept = self.partials.of(key)
        return Explore(self.incarnation, key, self._attempts[key], self._cursor.task(key), seeds, self._sampling, kept)

    def drop(self, key: GroupKey) -> None:
        """Gives a group up, to be issued again."""
        self._dropped += 1
        self.partials.forget(key)
        self._ledger.dropped(key)
        self._attempts[key] += 1  # an answer on its way is too late

    def expects(self, key: GroupKey, attempt: int) -> bool:
        """Whether an attempt at a group is still wanted."""
        return attempt == self._attempts[key]

    def lost(self, keys: Iterable[GroupKey], error: Exception, version: int) -> None:
        """Records that an explorer died with groups; one with which several died has failed."""
        for key in [key for key in keys if not Validation.owns(key)]:
            self._deaths[key] += 1
            if self._deaths[key] >= _DEATHS:
                self._fail(key, f"{_DEATHS} explorers died with it, the last: {error}", version)

    # When it has come back

    def judged(self, message: Explored) -> Judged:
        """Asks filter and score about a group, which may take long; changes nothing."""
        group = Group(message.key, message.task_id, message.experiences)
        if len(group.experiences) < self._min_samples:
            return Judged(group, message.failures[0].text)
        if not self._filter.keeps(group):
            return Judged(group, kept=False)
        return Judged(group, score=0.0 if self._score is None else self._score(group))

    def keep(self, judged: Judged, version: int, trained_by: int) -> bool:
        """Stores a group; False if it cannot be trained and must be issued again, or with another task.

        ``trained_by`` is the first step that can train it. Raises ConfigurationError if hardly any group passes the
        filter, and ScheduleError if the group's tokens were too old several times.
        """
        key = judged.group.key
        self.partials.forget(key)
        if judged.failure:
            self._fail(key, judged.failure, version)
            return False
        if not judged.group.is_fresh(trained_by, self._max_staleness):
            self._refuse(judged.group, trained_by)
            return False
        self._deaths.pop(key, None)
        self._filter.count(judged.group, judged.kept)
        if judged.kept:
            self._ledger.ready(judged.group)
        else:
            self._ledger.filtered(key, step=version)
            self._learn(judged.group)
            self._cursor.replace(key)
        return judged.kept

    def kept(self, batch: int) -> list[Group]:
        """Reads a batch whose groups are all ready and are not to be trained."""
        keys = self._cursor.in_order(GroupKey(batch, slot) for slot in range(self._cursor.plan.size(batch)))
        self._cursor.follow()
        self._done(keys)
        return list(self._ledger.read(keys))

    # When it is trained

    def lease(self, keys: Sequence[GroupKey], batch: int) -> None:
        """Takes a batch for the trainer; ScheduleError if any token is outside the strategy's bound."""
        self.leased = self._ledger.lease(self._cursor.in_order(keys))
        for group in self.leased:
            if not group.is_fresh(batch, self._max_staleness):
                raise ScheduleError(
                    f"task {group.task_id!r} reached the training step of version {batch} with tokens of versions "
                    f"{group.oldest_version} to {group.newest_version}, but the strategy allows a staleness of 0 to "
                    f"{self._max_staleness}"
                )

    def with_replay(self, batch: int) -> list[Group]:
        """The leased groups and those replayed with them."""
        assert self.leased is not None
        return [*self.leased, *self._replay.chosen(batch)]

    def trained(self, batch: int) -> None:
        """Records that the leased groups are part of the weights."""
        assert self.leased is not None
        self._ledger.trained(batch)
        if self._keep is not None:
            self._ledger.prune(batch + 1 - self._keep)
        for group in self.leased:
            self._learn(group)
        self._cursor.follow()
        self._done(group.key for group in self.leased)
        self._replay.trained(batch, self.leased)
        self.leased = None

    def release(self) -> None:
        """Gives back the leased groups, at the end of a run."""
        if self.leased is not None:
            self._ledger.release()

    # Of the whole run

    def metrics(self) -> dict[str, float]:
        """Counts of groups that were not simply trained once."""
        return {
            "rft/dropped_groups": float(self._dropped),
            "rft/failed_groups": float(self._failed),
            "rft/filtered_groups": float(self._filter.refused),
            "rft/filtered_share": self._filter.share(),
            "rft/left_out_tasks": float(self._cursor.left_out),
            "rft/replayed_groups": float(self._replay.replayed),
        }

    def state_dict(self, progress: Progress) -> dict[str, Any]:
        """The state of the run as plain values, for a checkpoint."""
        return run_state(progress, self._cursor, self._ledger, self.incarnation)

    # How a group ends

    def _learn(self, group: Group) -> None:
        self._cursor.learn(group.key, [experience.reward for experience in group.experiences])

    def _done(self, keys: Iterable[GroupKey]) -> None:
        for key in keys:
            self._cursor.done(key)
            del self._attempts[key], self._refusals[key]

    def _refuse(self, group: Group, batch: int) -> None:
        self._refusals[group.key] += 1
        if self._refusals[group.key] > _REFUSALS:
            raise ScheduleError(
                f"task {group.task_id!r} came back with tokens of version {group.oldest_version} for batch {batch} "
                f"again and again, but the strategy allows a staleness of {self._max_staleness}: its explorer "
                "does not compute with the weights that it says it loaded"
            )
        self.drop(group.key)

    def _fail(self, key: GroupKey, why: str, version: int) -> None:
        self._failed += 1
        self._deaths.pop(key, None)
        self.partials.forget(key)
        _log.warning("task %r failed and is replaced: %s", self._cursor.task(key).id, why.strip().splitlines()[-1])
        self._ledger.failed(key, why, step=version)
        self._cursor.replace(key)
