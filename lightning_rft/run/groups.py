"""What becomes of a run's groups, from issue to training: the buffer, the tasks and the filters told in one go."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rft.buffer.ledger import Ledger
from lightning_rft.buffer.selection import Filter, ReplayMemory
from lightning_rft.errors import ScheduleError
from lightning_rft.experience import Group, GroupKey, Progress
from lightning_rft.explorer.messages import Explore, Explored
from lightning_rft.run.resume import run_state
from lightning_rft.run.validation import Validation
from lightning_rft.settings import Sampling
from lightning_rft.tasks.plan import TaskCursor

__all__ = ["Groups", "Judged"]

_log = logging.getLogger(__name__)

_REFUSALS = 3  # of one group: by then it is not chance
_DEATHS = 2  # of explorers with the same group: it may be what kills them


@dataclass(frozen=True)
class Judged:
    """A group that came back, without the samples that failed, and what the user's own functions say of it."""

    group: Group
    #: Why one of its samples failed, if one did.
    failure: str = ""
    #: Whether the filter keeps it.
    kept: bool = True
    score: float = 0.0

    @property
    def oldest(self) -> int | None:
        """Version of its oldest token."""
        return self.group.oldest_version if self.group.experiences else None


class Groups:
    """Keeps the account of every group. Not thread-safe, but for :meth:`judged`.

    Args:
        ledger: The buffer.
        cursor: Which task belongs where.
        incarnation: Number of this run in the ledger; explorers' answers carry it.
        samples_per_task: Samples of a group.
        min_samples: With fewer that succeeded, a group has failed, and another task takes its place.
        sampling: How training samples.
        max_staleness: The strategy's bound; what is older is explored again.
        group_filter: Says which groups are not to be trained: another task takes the place of each.
        score: Says what is to be trained first, where the strategy leaves a choice; ``None`` for the oldest.
        replay: Says what comes along with a batch.
    """

    def __init__(
        self,
        ledger: Ledger,
        cursor: TaskCursor,
        *,
        incarnation: int,
        samples_per_task: int,
        min_samples: int,
        sampling: Sampling,
        max_staleness: int,
        group_filter: Filter,
        score: Callable[[Group], float] | None,
        replay: ReplayMemory,
    ) -> None:
        self.incarnation = incarnation
        self.samples_per_task = samples_per_task
        #: The batch that is trained, or is about to be.
        self.leased: list[Group] | None = None
        self._ledger = ledger
        self._cursor = cursor
        self._min_samples = min_samples
        self._sampling = sampling
        self._max_staleness = max_staleness
        self._filter = group_filter
        self._score = score
        self._replay = replay
        self._dropped = self._failed = 0
        self._attempts: Counter[GroupKey] = Counter()
        self._refusals: Counter[GroupKey] = Counter()
        self._deaths: Counter[GroupKey] = Counter()

    # While a group is explored

    def issue(self, issues: Sequence[tuple[GroupKey, int]]) -> list[tuple[Explore, int]]:
        """Notes which explorers are at which groups; returns what each is to be told."""
        with self._ledger.together():
            for key, explorer in issues:
                self._ledger.issue(key, self._cursor.task(key).id, self._cursor.epoch(key), explorer)
        return [(self._asks(key), explorer) for key, explorer in issues]

    def _asks(self, key: GroupKey) -> Explore:
        seeds = tuple(self._cursor.sample_seed(key, sample) for sample in range(self.samples_per_task))
        self._attempts[key] += 1
        return Explore(self.incarnation, key, self._attempts[key], self._cursor.task(key), seeds, self._sampling)

    def drop(self, key: GroupKey) -> None:
        """Gives a group up, to be issued again."""
        self._dropped += 1
        self._ledger.dropped(key)
        self._attempts[key] += 1  # an answer that is on its way is too late

    def expects(self, key: GroupKey, attempt: int) -> bool:
        """Whether a group was not given up since it was issued."""
        return attempt == self._attempts[key]

    def lost(self, keys: Iterable[GroupKey], error: Exception, version: int) -> None:
        """Notes that an explorer died with groups; one that others died with, too, has failed."""
        for key in [key for key in keys if not Validation.owns(key)]:
            self._deaths[key] += 1
            if self._deaths[key] >= _DEATHS:
                self._fail(key, f"{_DEATHS} explorers died with it, the last: {error}", version)

    # When it has come back

    def judged(self, message: Explored) -> Judged:
        """Asks filter and score about a group, which may take their time: nothing is changed."""
        group = Group(message.key, message.task_id, message.experiences)
        if len(group.experiences) < self._min_samples:
            return Judged(group, message.failures[0].text)
        if not self._filter.keeps(group):
            return Judged(group, kept=False)
        return Judged(group, score=0.0 if self._score is None else self._score(group))

    def keep(self, judged: Judged, version: int, trained_by: int) -> bool:
        """Stores a group; ``False`` if it cannot be trained, and is to be issued again, or with another task.

        Args:
            judged: The group.
            version: Batches trained so far.
            trained_by: The first step that can train it.

        Raises:
            ConfigurationError: Hardly any group passes the filter.
            ScheduleError: Its tokens were too old again and again.
        """
        key = judged.group.key
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
            self._cursor.replace(key)
        return judged.kept

    def read(self, batch: int) -> list[Group]:
        """The groups of a batch that are ready."""
        keys = [GroupKey(batch, slot) for slot in range(self._cursor.plan.size(batch))]
        return list(self._ledger.read(keys))

    # When it is trained

    def lease(self, keys: Sequence[GroupKey], batch: int) -> None:
        """Takes a batch for the trainer.

        This is where the strategy's bound is enforced, and it believes nobody: it reads the version of every token.
        Raises :class:`ScheduleError` if one is outside.
        """
        self.leased = self._ledger.lease(keys)
        for group in self.leased:
            if not group.is_fresh(batch, self._max_staleness):
                raise ScheduleError(
                    f"task {group.task_id!r} reached the training step of version {batch} with tokens of versions "
                    f"{group.oldest_version} to {group.newest_version}, but the strategy allows a staleness of 0 to "
                    f"{self._max_staleness}"
                )

    def with_replay(self, batch: int) -> list[Group]:
        """What is leased, and what is replayed along with it."""
        assert self.leased is not None
        return [*self.leased, *self._replay.chosen(batch)]

    def trained(self, batch: int) -> None:
        """Notes that what is leased is part of the weights."""
        assert self.leased is not None
        self._ledger.trained(batch)
        for group in self.leased:
            self._cursor.done(group.key)
        self._replay.trained(batch, self.leased)
        self.leased = None

    def release(self) -> None:
        """Gives back what is leased, for a run that ends."""
        if self.leased is not None:
            self._ledger.release()

    # What is told of all

    def metrics(self) -> dict[str, float]:
        """How many groups ended otherwise than by being trained once."""
        return {
            "rft/dropped_groups": float(self._dropped),
            "rft/failed_groups": float(self._failed),
            "rft/filtered_groups": float(self._filter.refused),
            "rft/filtered_share": self._filter.share(),
            "rft/replayed_groups": float(self._replay.replayed),
        }

    def state_dict(self, progress: Progress) -> dict[str, Any]:
        """Where the run stands, for a checkpoint: plain values."""
        return run_state(progress, self._cursor, self._ledger, self.incarnation)

    # How

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
        """Ends a group's task as failed; the next task takes its place in the batch."""
        self._failed += 1
        self._deaths.pop(key, None)
        _log.warning("task %r failed and is replaced: %s", self._cursor.task(key).id, why.strip().splitlines()[-1])
        self._ledger.failed(key, why, step=version)
        self._cursor.replace(key)
