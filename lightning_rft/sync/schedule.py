"""Which group is explored when, by whom, and when weights are published: one pure state machine.

Events go in as method calls, actions come out as values. It knows no clock, process or tensor: callback, pool and
loader only drive it, and so do the tests, with a clock of their own.

Batches are numbered 0, 1, ...; a batch has ``size(b)`` groups; version ``v`` of the policy has been trained on ``v``
batches. Two answers of a strategy decide nearly everything (see :class:`Rule`): an explorer may start a group of batch
``b`` once it has itself loaded a version >= ``admit(b)``, and the trainer publishes after the batches for which
``publishes_after`` says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import GroupKey

__all__ = ["Action", "Drop", "Issue", "Lease", "Load", "Publish", "Rule", "Schedule"]

_CHECKED_BATCHES = 1000


class Rule(ABC):
    """What makes one strategy differ from another: two answers, and how strict it is about order."""

    #: False: batches are trained in the order in which they were issued, and the trainer waits for every push.
    #: True: a step trains the groups with the oldest weights first, and pushes happen in the background.
    asynchronous: bool = False
    #: Whether an explorer may change weights while it works on groups; else it finishes them first.
    in_flight: bool = False
    #: Whether explorers load one after another, so that exploration never stops as a whole.
    staggered: bool = False
    #: What becomes of a group that would be too old after the next step: the step waits for it, or it is dropped.
    overdue: Literal["wait", "drop"] = "wait"

    @property
    @abstractmethod
    def max_staleness(self) -> int:
        """Most batches that a token may lag behind the version that is trained."""

    @abstractmethod
    def admit(self, batch: int) -> int:
        """The version that an explorer must have loaded before it may start a group of ``batch``.

        Never decreases with ``batch``.
        """

    @abstractmethod
    def publishes_after(self, batch: int) -> bool:
        """Whether new weights are due once ``batch`` is trained."""


@dataclass(frozen=True)
class Issue:
    """Explore ``group`` on ``explorer``."""

    group: GroupKey
    explorer: int


@dataclass(frozen=True)
class Lease:
    """These groups make up ``batch``, which the trainer wants: hand them over."""

    batch: int
    groups: tuple[GroupKey, ...]


@dataclass(frozen=True)
class Publish:
    """Version ``version`` is due, and nothing that older weights must explore is still open: push it now."""

    version: int


@dataclass(frozen=True)
class Load:
    """Have ``explorer`` load ``version`` now, or a newer one that is published meanwhile."""

    explorer: int
    version: int


@dataclass(frozen=True)
class Drop:
    """Forget ``group``, which is too old by now; it is issued again. ``explorer`` works on it, or nobody."""

    group: GroupKey
    explorer: int | None


Action = Issue | Lease | Publish | Load | Drop


@dataclass
class _Explorer:
    """What the schedule knows of one explorer."""

    most: float = inf
    loaded: int = -1
    loading: bool = False
    groups: set[GroupKey] = field(default_factory=set)

    @property
    def room(self) -> float:
        """How many more groups it could work on."""
        return self.most - len(self.groups)


class Schedule:
    """Admits, assigns and accounts for groups.

    Args:
        rule: The strategy's answers.
        size: Number of groups of a batch, at least 1.
        first: Batch to start with, which is also the version at the start.
        stop: Batches before ``stop`` exist; ``None`` for no end.
        capacity: Most groups that may be issued and not yet trained; ``None`` for no limit. It limits issuing, never
            storing, and a group that is issued again was counted already.

    Raises:
        ConfigurationError: The rule or the capacity can never make progress; the message has the arithmetic.

    Example:
        >>> class OnPolicy(Rule):
        ...     max_staleness = 0
        ...     def admit(self, batch): return batch
        ...     def publishes_after(self, batch): return True
        >>> schedule = Schedule(OnPolicy(), size=lambda batch: 1)
        >>> schedule.joined(0) + schedule.wanted(0)
        []
        >>> schedule.loaded(0, 0) + schedule.published(0)
        [Issue(group=GroupKey(batch=0, slot=0), explorer=0)]
        >>> schedule.ready(GroupKey(0, 0))
        [Lease(batch=0, groups=(GroupKey(batch=0, slot=0),))]
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
        self.push_pending = False  # from the batch that makes a push due until the push
        self._size = size
        self._stop = stop
        self._capacity = capacity
        self._explorers: dict[int, _Explorer] = {}
        self._next = GroupKey(first, 0)
        # An issued group is in one of the next four. With it goes the version that it is, or at least will be, of.
        self._running: dict[GroupKey, int] = {}
        self._ready: dict[GroupKey, int] = {}
        self._leased: dict[GroupKey, int] = {}
        self._again: dict[GroupKey, int] = {}  # to be issued once more
        self._wanted: int | None = None
        self._due: int | None = None
        if capacity is not None and self._exists(first) and capacity < size(first):
            raise ConfigurationError(
                f"buffer_capacity={capacity} is below one batch of tasks_per_step={size(first)} groups, so no batch "
                f"could ever be completed: set buffer_capacity to at least {size(first)}"
            )
        _check(rule, first, stop)

    # Events

    def joined(self, explorer: int, room: int | None = None) -> list[Action]:
        """An explorer is up; it gets work once it has loaded a version.

        Args:
            explorer: Its index.
            room: Most groups that it works on at the same time; ``None`` for any number. What it has no room for is
                not issued yet, and may be explored by others, or with newer weights.
        """
        self._explorers[explorer] = _Explorer(inf if room is None else room)
        return self._actions()

    def died(self, explorer: int) -> list[Action]:
        """An explorer is gone; its groups go to others, each under its own batch index."""
        for group in self._explorers.pop(explorer).groups:
            self._again[group] = self._running.pop(group)
        return self._actions()

    def loaded(self, explorer: int, version: int) -> list[Action]:
        """An explorer computes with ``version`` from now on."""
        member = self._explorers[explorer]
        if version < member.loaded:
            raise ScheduleError(f"explorer {explorer} went back from version {member.loaded} to {version}")
        if version > self.version:
            raise ScheduleError(f"explorer {explorer} loaded version {version}, but only {self.version} exists")
        member.loaded, member.loading = version, False
        return self._actions()

    def ready(self, group: GroupKey, version: int | None = None) -> list[Action]:
        """A group came back with its experience.

        Args:
            group: The group.
            version: Oldest version of its tokens; left out, the one that its explorer had loaded when it was issued.
        """
        issued = self._take_back(group)
        self._ready[group] = issued if version is None else version
        return self._actions()

    def failed(self, group: GroupKey) -> list[Action]:
        """A group came back without; it is issued again under the same batch index."""
        self._again[group] = self._take_back(group)
        return self._actions()

    def wanted(self, batch: int) -> list[Action]:
        """The trainer waits for ``batch``."""
        if batch != self.version:
            raise ScheduleError(f"batch {batch} was asked for with version {self.version}: it must be the same number")
        self._wanted = batch
        return self._actions()

    def refused(self, groups: Iterable[GroupKey]) -> list[Action]:
        """Leased groups turned out too old to be trained: they are issued again, and the batch is still wanted."""
        oldest = self.version - self.rule.max_staleness
        for group in groups:
            self._again[group] = max(self._leased.pop(group), oldest, self.rule.admit(group.batch))
        self._ready |= self._leased
        self._leased = {}
        self._wanted = self.version
        return self._actions()

    def trained(self, batch: int) -> list[Action]:
        """``batch`` is part of the weights now, whether or not they changed by it."""
        if batch != self.version:
            raise ScheduleError(f"batch {batch} was trained by version {self.version}: batches must come in order")
        self.version += 1
        self._leased = {}
        if self.rule.publishes_after(batch):
            self._due = self.version
            self.push_pending = not self.rule.asynchronous
        return self._actions()

    def published(self, version: int) -> list[Action]:
        """``version`` was pushed: to every explorer, or if that happens in the background so that it can be loaded."""
        newest = version <= self.version if self.rule.asynchronous else version == self.version
        if not newest or version <= self.published_version:
            raise ScheduleError(
                f"version {version} was published after {self.published_version}, with the trainer at {self.version}"
            )
        self.published_version = version
        if self._due is not None and self._due <= version:
            self._due = None
        self.push_pending = False
        return self._actions()

    # Answers

    @property
    def idle(self) -> bool:
        """Whether no explorer has anything to do."""
        return not any(member.groups for member in self._explorers.values())

    @property
    def explorers(self) -> list[int]:
        """Those that have joined and not died."""
        return list(self._explorers)

    def waits_for(self, explorer: int) -> str | None:
        """Why an explorer does nothing: ``"weights"``, ``"room"`` or, at the end, ``"nothing"``; ``None`` if it works.

        ``"load"`` if it is about to get or just getting new weights.
        """
        member = self._explorers[explorer]
        if member.groups:
            return None
        if member.loading:
            return "load"
        if not self._again and not self._exists(self._next.batch):
            return "nothing"
        return "room" if not self._again and self._full else "weights"

    # How they come about

    def _exists(self, batch: int) -> bool:
        return self._stop is None or batch < self._stop

    def _take_back(self, group: GroupKey) -> int:
        for member in self._explorers.values():
            if group in member.groups:
                member.groups.remove(group)
                return self._running.pop(group)
        raise ScheduleError(f"{group} came back, but no explorer was asked for it")

    def _actions(self) -> list[Action]:
        lease = self._lease()
        return [*lease, *self._loads(), *self._issues(), *self._publishes()]

    # Who works on what

    def _issues(self) -> list[Action]:
        issues: list[Action] = []
        resting, soon = self._resting(), self._soon()
        for group, floor in self._candidates():
            # A version counts once it is pushed: else the first explorer to load it would be given everything.
            able = {
                index
                for index, member in self._explorers.items()
                if floor <= member.loaded <= self.published_version and index not in resting and member.room > 0
            }
            # For the same reason the one with most room is waited for if it is about to load.
            explorer = min(able | soon, key=lambda index: (*self._busy(index), index not in able, index), default=-1)
            if explorer not in able:
                if group in self._again:
                    continue  # it needs weights that are new for its batch, which others may not
                break  # admit never decreases, so no later group can be issued either
            member = self._explorers[explorer]
            if self._again.pop(group, None) is None:
                batch, slot = group
                self._next = GroupKey(batch, slot + 1) if slot + 1 < self._size(batch) else GroupKey(batch + 1, 0)
            member.groups.add(group)
            self._running[group] = member.loaded
            issues.append(Issue(group, explorer))
        return issues

    def _candidates(self) -> Iterable[tuple[GroupKey, int]]:
        """Groups that could be issued, with the oldest version that may explore each; first those to be repeated.

        One that is repeated needs weights no older than the first time: what was promised of it still holds.
        """
        yield from sorted(self._again.items())
        while self._exists(self._next.batch) and not self._full:
            # no work before the first push, whatever the rule
            yield self._next, max(0, self.rule.admit(self._next.batch))

    @property
    def _full(self) -> bool:
        issued = len(self._running) + len(self._ready) + len(self._leased) + len(self._again)
        return self._capacity is not None and issued >= self._capacity

    # Who loads when

    def _turns(self) -> list[int]:
        """Explorers whose turn it is to load what is published."""
        members = self._explorers
        lagging = [index for index, member in members.items() if member.loaded < self.published_version]
        if not self.rule.staggered:
            return lagging
        loading = [index for index in lagging if members[index].loading]
        return loading or sorted(lagging, key=lambda index: (members[index].loaded, index))[:1]

    def _loads(self) -> list[Action]:
        loads: list[Action] = []
        for index in self._turns():
            member = self._explorers[index]
            if not member.loading and (self.rule.in_flight or not member.groups):
                member.loading = True
                loads.append(Load(index, self.published_version))
        return loads

    def _busy(self, explorer: int) -> tuple[float, int]:
        """Sorts explorers, the one with most room first."""
        member = self._explorers[explorer]
        return -member.room, len(member.groups)

    def _soon(self) -> set[int]:
        """Explorers that load, or will as soon as it is their turn."""
        return {
            index
            for index, member in self._explorers.items()
            if member.room > 0
            and (
                member.loading
                or (member.loaded < self.published_version and (self.rule.in_flight or not member.groups))
            )
        }

    def _resting(self) -> set[int]:
        """Explorers that get no work: they load, or first finish what they have."""
        turns = set() if self.rule.in_flight else set(self._turns())
        return turns | {index for index, member in self._explorers.items() if member.loading}

    # What is trained

    def _complete(self, batch: int) -> bool:
        """Whether every group of a batch has come back."""
        unfinished = (*self._running, *self._again)
        return self._next.batch > batch and not any(group.batch == batch for group in unfinished)

    def _lease(self) -> list[Action]:
        if self._wanted is None:
            return []
        batch, drops = self._wanted, []
        if self.rule.asynchronous:
            oldest = sorted(self._ready, key=lambda group: (self._ready[group], group))
            groups = oldest[: self._size(batch)]
            if len(groups) < self._size(batch):
                return []
            if self.rule.overdue == "wait" and self._would_be_late(groups):
                return []
        elif self._complete(batch):
            groups = sorted(group for group in self._ready if group.batch == batch)
        else:
            return []
        self._wanted = None
        self._leased = {group: self._ready.pop(group) for group in groups}
        if self.rule.asynchronous and self.rule.overdue == "drop":
            drops = self._drops()
        return [Lease(batch, tuple(groups)), *drops]

    def _would_be_late(self, groups: Sequence[GroupKey]) -> bool:
        """Whether training ``groups`` now would leave others too little room to be trained before they are too old.

        A group of version ``v`` is trained by step ``v + max_staleness`` at the latest. Of all those that are due by
        step ``d``, the steps after this one up to ``d`` have room for so many; the rest must be in this one. At most a
        batch of groups is ever missed, because a group of batch ``b`` is never due before step ``b``.
        """
        bound = self.rule.max_staleness
        chosen = set(groups)
        left = [version for group, version in self._ready.items() if group not in chosen]
        unfinished = [*self._running.values(), *self._again.values()]
        left += unfinished
        room, step = 0, self.version
        for due in sorted({version + bound for version in unfinished}):
            while step < due and self._exists(step + 1):
                step += 1
                room += self._size(step)
            if sum(version + bound <= due for version in left) > room:
                return True
        return False

    def _drops(self) -> list[Action]:
        """Gives up whatever is too old once the leased batch is trained."""
        oldest = self.version + 1 - self.rule.max_staleness
        drops: list[Action] = []
        for group in [group for group, version in self._running.items() if version < oldest]:
            explorer = next(index for index, member in self._explorers.items() if group in member.groups)
            self._take_back(group)
            drops.append(Drop(group, explorer))
        for group in [group for group, version in self._ready.items() if version < oldest]:
            del self._ready[group]
            drops.append(Drop(group, None))
        for group, version in self._again.items():
            self._again[group] = max(version, oldest)
        self._again |= {drop.group: oldest for drop in drops if isinstance(drop, Drop)}
        return drops

    # When weights go back

    def _publishes(self) -> list[Action]:
        """A due version is held back until no group that belongs to older weights is open.

        Otherwise a replacement of a failed group would be explored with newer weights than its batch, and the order
        of versions would no longer repeat from run to run. What back-pressure keeps from being issued is not waited
        for: only training makes room, and the trainer waits for this push.
        """
        if self._due is None:
            return []
        if not self.rule.asynchronous and not self.rule.in_flight:
            batch = self.version
            while self._exists(batch) and self.rule.admit(batch) < self._due:
                if any(group.batch == batch for group in (*self._running, *self._again)):
                    return []
                if self._next.batch <= batch:
                    if not self._full:
                        return []
                    break
                batch += 1
        version, self._due = self._due, None
        return [Publish(version)]


def _check(rule: Rule, first: int, stop: int | None) -> None:
    """Refuses a rule that breaks its own bound, or under which some batch could never be explored."""
    name, pushed, before = type(rule).__name__, first, first
    for batch in range(first, min(first + _CHECKED_BATCHES, first + _CHECKED_BATCHES if stop is None else stop)):
        admitted = max(rule.admit(batch), first)  # there is nothing older than the first
        if admitted < before:
            raise ConfigurationError(
                f"{name}.admit({batch}) is {admitted}, less than {before} for the batch before: it must never decrease"
            )
        if batch - admitted > rule.max_staleness:
            raise ConfigurationError(
                f"{name}.admit({batch}) is {admitted}: {batch} - {admitted} is a staleness of {batch - admitted} when"
                f" that batch is trained, above max_staleness={rule.max_staleness}"
            )
        if admitted > pushed:
            raise ConfigurationError(
                f"{name} could never train batch {batch}: admit({batch}) asks for version {admitted}, but the newest"
                f" that is pushed before batch {batch} is trained is {pushed}. Push more often or admit earlier"
            )
        before = admitted
        if rule.publishes_after(batch):
            pushed = batch + 1
