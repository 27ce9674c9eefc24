"""The order of groups: which is issued next, and which step trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import GroupKey, Progress
from lightning_rft.sync.feasibility import best_groups, moved_groups, would_be_late
from lightning_rft.sync.rule import Rule, check_rule, checked_batches

__all__ = ["Order"]


class Order:
    """Every group from issue to training, without the explorers.

    Raises ConfigurationError if the rule or the capacity can never make progress, and ScheduleError if ``progress`` and
    ``ready`` contradict each other, themselves or the rule's bound.

    Args:
        rule: The strategy's answers.
        size: Number of groups of a batch, at least 1.
        stop: Batches before ``stop`` exist; ``None`` for no end.
        capacity: Maximum groups issued and not yet trained. It limits issuing, never storing.
        progress: What is part of the weights at the start; groups left from earlier batches come first.
        ready: Stored groups that were not trained -> oldest version of their tokens. One that this rule cannot train in
            time is dropped and issued again.
        scores: Scores of the groups in ``ready``.
    """

    def __init__(
        self,
        rule: Rule,
        size: Callable[[int], int],
        *,
        stop: int | None = None,
        capacity: int | None = None,
        progress: Progress = Progress(0),  # noqa: B008 (immutable)
        ready: Mapping[GroupKey, int] | None = None,
        scores: Mapping[GroupKey, float] | None = None,
    ) -> None:
        self.rule = rule
        #: Batches trained so far.
        self.version = progress.version
        self._size = size
        self._first = progress.version  # the oldest version there is
        self._stop = stop
        self._capacity = capacity
        self._behind, self._ahead = set(progress.behind), set(progress.ahead)
        self._moved = moved_groups(progress, size)
        # An issued group is in one of the next four, with the version that it has, or will at least have.
        self._running: dict[GroupKey, int] = {}
        self._ready: dict[GroupKey, int] = {}
        self._leased: dict[GroupKey, int] = {}
        self._again: dict[GroupKey, int] = {}  # to be issued once more
        self._kept: set[GroupKey] = set()  # of those, with tokens that are at least of that version
        self._scores = dict(scores or {})  # of what is ready or leased
        check_rule(rule, self._first, stop)
        self._check_capacity()
        #: Stored groups that cannot be trained.
        self.unusable = self._keep(ready or {}, progress)
        self._passed = {*self._ready, *self._ahead}  # what is not issued when its turn comes
        self._next = GroupKey(self._first, 0)
        self._skip()
        for group in sorted(progress.behind - self._ready.keys()):
            if self._exists(self._step(group)):
                self._repeat(group, self._floor(self._turn))

    def _check_capacity(self) -> None:
        largest = max((self._size(batch) for batch in checked_batches(self._first, self._stop)), default=0)
        if self._capacity is not None and self._capacity < largest:
            raise ConfigurationError(
                f"Buffer(capacity={self._capacity}) is below one batch of tasks_per_step={largest} groups, so no batch "
                f"could ever be completed: set capacity to at least {largest}"
            )

    def _keep(self, ready: Mapping[GroupKey, int], progress: Progress) -> list[GroupKey]:
        """Takes over stored groups; returns what has to be dropped."""
        bound, unusable = self.rule.max_staleness, []
        for group, version in ready.items():
            if progress.trained(group) or not self._first - bound <= version <= self._first:
                raise ScheduleError(
                    f"{group} of version {version} cannot be ready for version {self._first}: it is trained already, "
                    f"from the future, or above max_staleness={bound}"
                )
            # Asynchronous training drops what is too old later, when that is certain.
            late = not self.rule.asynchronous and self._step(group) - version > bound
            if late or not self._exists(self._step(group)):
                unusable.append(group)
            else:
                self._ready[group] = version
        return unusable

    # Which step trains what

    @property
    def progress(self) -> Progress:
        """What is part of the weights."""
        return Progress(self.version, frozenset(self._behind), frozenset(self._ahead))

    def trained_by(self, group: GroupKey) -> int:
        """The first step that can train a group that has come back."""
        return self.version if self.rule.asynchronous else self._step(group)

    def is_ready(self, batch: int) -> bool:
        """Whether every group of a batch has come back and can be trained."""
        return all(GroupKey(batch, slot) in self._ready for slot in range(self._size(batch)))

    def arrived(self, batch: int) -> tuple[int, int]:
        """How many groups that can be in a batch have come back, and how many it needs."""
        size = self._size(batch)
        ready = self._ready if self.rule.asynchronous else self._ready_for(batch)
        return min(len(ready), size), size

    def _ready_for(self, batch: int) -> list[GroupKey]:
        return sorted(group for group in self._ready if self._step(group) == batch)

    def _exists(self, batch: int) -> bool:
        return self._stop is None or batch < self._stop

    def _room(self, step: int) -> int:
        """How many groups a step trains."""
        return self._size(step) if self._exists(step) else 0

    def _step(self, group: GroupKey) -> int:
        """The step that trains a group if batches keep their order."""
        return self._moved.get(group, group.batch)

    @property
    def _turn(self) -> int:
        """The latest step that trains the next group to be issued.

        In asynchronous training, everything issued before goes first, including what a resume kept of later batches.
        """
        if not self.rule.asynchronous:
            return self._step(self._next)
        step, issued = self.version, self._issued
        while issued >= self._size(step):
            issued -= self._size(step)
            step += 1
        return step

    @property
    def _issued(self) -> int:
        return len(self._running) + len(self._ready) + len(self._leased) + len(self._again)

    def _floor(self, step: int) -> int:
        """The oldest version that may explore for a step."""
        return max(self._first, self.rule.admit(step))

    # Issuing

    def candidates(self) -> Iterator[tuple[GroupKey, int]]:
        """Groups that could be issued, those to be repeated first, with the oldest version that may explore each."""
        yield from sorted(self._again.items())
        while self._exists(turn := self._turn) and not self._full:
            group = self._next
            yield group, self._floor(turn)
            if group == self._next:
                return  # not issued, and admit never decreases: no later one could be

    def issue(self, group: GroupKey, version: int) -> int:
        """Has a candidate explored with a version; returns the oldest that any of its tokens may be of."""
        before = self._again.pop(group, None)
        if before is None:
            self._passed.add(group)
            self._skip()
        elif group in self._kept:
            self._kept.remove(group)
            version = before
        self._running[group] = version
        return version

    def _skip(self) -> None:
        """Moves on to the next group that was never issued."""
        while self._next in self._passed:
            self._passed.remove(self._next)
            batch, slot = self._next
            self._next = GroupKey(batch, slot + 1) if slot + 1 < self._size(batch) else GroupKey(batch + 1, 0)

    @property
    def _full(self) -> bool:
        """Whether training must make room before a new group is issued.

        Not if the next step needs the group: groups of later batches, kept on a resume, may fill the buffer.
        """
        return self._capacity is not None and self._issued >= self._capacity and self._turn > self.version

    @property
    def held_up_by(self) -> Literal["weights", "room", "nothing"]:
        """What the next issue waits for; ``"nothing"`` if there is none."""
        if self._again:
            return "weights"
        if not self._exists(self._turn):
            return "nothing"
        return "room" if self._full else "weights"

    def needs_older(self, version: int) -> bool:
        """Whether a group that belongs to weights before a version is yet to come back.

        Not if it is held back by a full buffer: only training makes room.
        """
        steps = [self._step(group) for group in (*self._running, *self._again)]
        if self._exists(self._turn) and not self._full:
            steps.append(self._turn)
        return any(self.rule.admit(step) < version for step in steps)

    # Coming back

    def ready(self, group: GroupKey, version: int | None, score: float) -> None:
        """Takes in a group that has come back, by default with the version that it was issued with."""
        issued = self._running.pop(group)
        self._ready[group] = issued if version is None else version
        self._scores[group] = score

    def repeat(self, group: GroupKey, *, kept: bool = False) -> None:
        """Has a group that is being explored issued once more, perhaps to go on with tokens that were ``kept``."""
        self._repeat(group, self._running.pop(group))
        if kept:
            self._kept.add(group)

    def _repeat(self, group: GroupKey, version: int) -> None:
        """Has a group issued once more.

        In asynchronous training, with weights no older than the first time, so that its due step stands. Otherwise with
        any that its batch admits: newer ones may have been loaded by a late explorer alone, which is gone, and the push
        that would bring them to others waits for this group.
        """
        self._again[group] = version if self.rule.asynchronous else self._floor(self._step(group))

    def drop_overdue(self) -> list[GroupKey]:
        """Has those groups issued once more that will be too old once the leased batch is trained; returns them.

        If steps wait, those can only be groups kept on a resume under another rule.
        """
        oldest = self.version + 1 - self.rule.max_staleness
        overdue: list[GroupKey] = []
        for groups in (self._running, self._ready):
            late = [group for group, version in groups.items() if version < oldest]
            for group in late:
                self._repeat(group, max(groups.pop(group), oldest))
            overdue += late
        for group, version in self._again.items():
            self._again[group] = max(version, oldest)
        return overdue

    # Training

    def lease(self, batch: int) -> tuple[GroupKey, ...]:
        """Takes the groups of a batch for training; none if it has to wait."""
        if self.rule.asynchronous:
            groups = self._best(batch)
        else:
            groups = self._ready_for(batch) if self._complete(batch) else []
        if groups:
            self._leased = {group: self._ready.pop(group) for group in groups}
        return tuple(groups)

    def _complete(self, batch: int) -> bool:
        unfinished = (*self._running, *self._again)
        return self._turn > batch and not any(self._step(group) == batch for group in unfinished)

    def _best(self, step: int) -> list[GroupKey]:
        """What an asynchronous step trains, of any batch; nothing if it has to wait."""
        size, bound = self._size(step), self.rule.max_staleness
        if len(self._ready) < size:
            return []
        unfinished = [*self._running.values(), *self._again.values()]
        left = sorted(self._ready.values())[size:]
        if self.rule.overdue == "wait" and would_be_late(left, unfinished, bound=bound, step=step, room=self._room):
            return []
        return best_groups(self._ready, unfinished, self._scores, bound=bound, step=step, room=self._room)

    def trained(self, batch: int) -> None:
        """Takes in that the leased groups are part of the weights."""
        of_batch = {GroupKey(batch, slot) for slot in range(self._size(batch))}
        self._behind |= of_batch - self._ahead
        self._behind -= self._leased.keys()
        self._ahead |= self._leased.keys()
        self._ahead = {group for group in self._ahead if group.batch > batch}
        for group in self._leased:
            self._scores.pop(group, None)
        self.version += 1
        self._leased = {}
