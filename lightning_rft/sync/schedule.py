"""Which group is explored when, by whom, and when weights are published: one pure state machine.

Events go in as method calls, actions come out as values. It knows no clock, process or tensor: callback, pool and
loader only drive it, and so do the tests, with a clock of their own.

Batches are numbered 0, 1, ...; a batch has ``size(b)`` groups; version ``v`` of the policy has been trained on the
batches before ``v``. Two answers of a strategy decide everything (see :class:`Rule`): an explorer may start a group of
batch ``b`` once it has itself loaded a version >= ``admit(b)``, and the trainer publishes after the batches for which
``publishes_after`` says so.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import GroupKey

__all__ = ["Action", "Issue", "Lease", "Publish", "Rule", "Schedule"]


class Rule(Protocol):
    """What makes one strategy differ from another."""

    def admit(self, batch: int) -> int:
        """The oldest version with which a group of ``batch`` may be started. Never decreases with ``batch``."""
        ...

    def publishes_after(self, batch: int) -> bool:
        """Whether new weights are due once ``batch`` is trained."""
        ...


@dataclass(frozen=True)
class Issue:
    """Explore ``group`` on ``explorer``."""

    group: GroupKey
    explorer: int


@dataclass(frozen=True)
class Lease:
    """Every group of ``batch`` is ready and the trainer wants it: hand it over."""

    batch: int


@dataclass(frozen=True)
class Publish:
    """Version ``version`` is due, and nothing that older weights must explore is still open: push it now."""

    version: int


Action = Issue | Lease | Publish


@dataclass
class _Explorer:
    """What the schedule knows of one explorer: the version it has loaded and the groups it works on."""

    loaded: int = -1
    groups: set[GroupKey] = field(default_factory=set)


class Schedule:
    """Admits, assigns and accounts for groups.

    Args:
        rule: The strategy's two answers.
        size: Number of groups of a batch, at least 1.
        first: Batch to start with, which is also the version at the start.
        stop: Batches before ``stop`` exist; ``None`` for no end.
        capacity: Most groups that may be issued and not yet trained; ``None`` for no limit. It limits issuing, never
            storing, and a group that is issued again was counted already.

    Raises:
        ConfigurationError: ``capacity`` is below one batch, so that no batch could ever be completed.

    Example:
        >>> class OnPolicy:
        ...     def admit(self, batch): return batch
        ...     def publishes_after(self, batch): return True
        >>> schedule = Schedule(OnPolicy(), size=lambda batch: 1)
        >>> schedule.joined(0) + schedule.wanted(0)
        []
        >>> schedule.published(0) + schedule.loaded(0, 0)
        [Issue(group=GroupKey(batch=0, slot=0), explorer=0)]
        >>> schedule.ready(GroupKey(0, 0))
        [Lease(batch=0)]
        >>> schedule.trained(0)
        [Publish(version=1)]
    """

    def __init__(
        self,
        rule: Rule,
        *,
        size: Callable[[int], int],
        first: int = 0,
        stop: int | None = None,
        capacity: int | None = None,
    ) -> None:
        self.rule = rule
        self.version = first  # batches trained so far
        self.published_version = -1
        self._size = size
        self._stop = stop
        self._capacity = capacity
        self._explorers: dict[int, _Explorer] = {}
        self._next = GroupKey(first, 0)
        self._again: list[GroupKey] = []  # heap: groups to be issued once more, the oldest first
        self._open: dict[int, set[GroupKey]] = {}  # batch -> its issued groups that are not ready
        self._outstanding = 0  # issued and not trained
        self._wanted: int | None = None
        self._due: int | None = None
        self.push_pending = False  # from the batch that makes a push due until the push
        if capacity is not None and self._exists(first) and capacity < size(first):
            raise ConfigurationError(
                f"buffer_capacity={capacity} is below one batch of tasks_per_step={size(first)} groups, so no batch "
                f"could ever be completed: set buffer_capacity to at least {size(first)}"
            )

    # Events

    def joined(self, explorer: int) -> list[Action]:
        """An explorer is up; it gets work once it has loaded a version."""
        self._explorers[explorer] = _Explorer()
        return []

    def died(self, explorer: int) -> list[Action]:
        """An explorer is gone; its groups go to others, each under its own batch index."""
        for group in self._explorers.pop(explorer).groups:
            heapq.heappush(self._again, group)
        return self._actions()

    def loaded(self, explorer: int, version: int) -> list[Action]:
        """An explorer computes with ``version`` from now on."""
        member = self._explorers[explorer]
        if version < member.loaded:
            raise ScheduleError(f"explorer {explorer} went back from version {member.loaded} to {version}")
        if version > self.version:
            raise ScheduleError(f"explorer {explorer} loaded version {version}, but only {self.version} exists")
        member.loaded = version
        return self._actions()

    def ready(self, group: GroupKey) -> list[Action]:
        """A group came back with its experience."""
        self._take_back(group)
        self._open[group.batch].discard(group)
        return self._actions()

    def failed(self, group: GroupKey) -> list[Action]:
        """A group came back without; it is issued again under the same batch index."""
        self._take_back(group)
        heapq.heappush(self._again, group)
        return self._actions()

    def wanted(self, batch: int) -> list[Action]:
        """The trainer waits for ``batch``."""
        if batch != self.version:
            raise ScheduleError(f"batch {batch} was asked for with version {self.version}: it must be the same number")
        self._wanted = batch
        return self._actions()

    def trained(self, batch: int) -> list[Action]:
        """``batch`` is part of the weights now, whether or not they changed by it."""
        if batch != self.version:
            raise ScheduleError(f"batch {batch} was trained by version {self.version}: batches must come in order")
        self.version += 1
        self._open.pop(batch, None)
        self._outstanding -= self._size(batch)
        if self.rule.publishes_after(batch):
            self._due = self.version
            self.push_pending = True
        return self._actions()

    def published(self, version: int) -> list[Action]:
        """``version`` was pushed to every explorer."""
        if version != self.version:
            raise ScheduleError(f"version {version} was published while the trainer is at {self.version}")
        self.published_version = version
        self._due = None
        self.push_pending = False
        return self._actions()

    # Answers

    @property
    def idle(self) -> bool:
        """Whether no explorer has anything to do."""
        return not any(member.groups for member in self._explorers.values())

    # How they come about

    def _exists(self, batch: int) -> bool:
        return self._stop is None or batch < self._stop

    def _take_back(self, group: GroupKey) -> None:
        for member in self._explorers.values():
            if group in member.groups:
                member.groups.remove(group)
                return
        raise ScheduleError(f"{group} came back, but no explorer was asked for it")

    def _actions(self) -> list[Action]:
        return [*self._issues(), *self._leases(), *self._publishes()]

    def _issues(self) -> list[Action]:
        issues: list[Action] = []
        while (group := self._candidate()) is not None:
            floor = max(0, self.rule.admit(group.batch))  # no work before the first push, whatever the rule
            # A version counts once it is pushed: else the first explorer to load it would be given everything.
            able = [i for i, member in self._explorers.items() if floor <= member.loaded <= self.published_version]
            if not able:
                break  # admit never decreases, so no later group can be admitted either
            explorer = min(able, key=lambda i: (len(self._explorers[i].groups), i))
            self._explorers[explorer].groups.add(group)
            self._advance(group)
            issues.append(Issue(group, explorer))
        return issues

    def _candidate(self) -> GroupKey | None:
        if self._again:
            return self._again[0]
        return self._next if self._exists(self._next.batch) and not self._full else None

    def _advance(self, group: GroupKey) -> None:
        if self._again:
            heapq.heappop(self._again)
            return
        self._open.setdefault(group.batch, set()).add(group)
        self._outstanding += 1
        batch, slot = group
        self._next = GroupKey(batch, slot + 1) if slot + 1 < self._size(batch) else GroupKey(batch + 1, 0)

    @property
    def _full(self) -> bool:
        return self._capacity is not None and self._outstanding >= self._capacity

    def _complete(self, batch: int) -> bool:
        """Whether every group of a batch has come back."""
        return self._next.batch > batch and not self._open.get(batch)

    def _leases(self) -> list[Action]:
        if self._wanted is None or not self._complete(self._wanted):
            return []
        batch, self._wanted = self._wanted, None
        return [Lease(batch)]

    def _publishes(self) -> list[Action]:
        """A due version is held back until no group that belongs to older weights is open.

        Otherwise a replacement of a failed group would be explored with newer weights than its batch, and the order
        of versions would no longer repeat from run to run. What back-pressure keeps from being issued is not waited
        for: only training makes room, and the trainer waits for this push.
        """
        if self._due is None:
            return []
        batch = self.version
        while self._exists(batch) and self.rule.admit(batch) < self._due:
            if self._open.get(batch):
                return []
            if not self._complete(batch):
                if not self._full:
                    return []
                break
            batch += 1
        version, self._due = self._due, None
        return [Publish(version)]
