"""The schedule: a pure state machine that decides who explores which group when, and when weights are pushed.

Events go in as method calls, actions come out as values. It knows no clock, process or tensor, so tests drive it with
a clock of their own.

Batches are numbered 0, 1, ...; version ``v`` of the policy has been trained on ``v`` batches. Two answers of a strategy
decide nearly everything (see :class:`Rule`): an explorer may start a group of batch ``b`` once it has itself loaded a
version >= ``admit(b)``, and the trainer pushes after the batches for which ``pushes_after`` says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf

from lightning_rft.errors import ScheduleError
from lightning_rft.experience import GroupKey
from lightning_rft.sync.actions import Action, Drop, Issue, Lease, Load, Push
from lightning_rft.sync.member import Member
from lightning_rft.sync.order import Order
from lightning_rft.sync.rule import Rule

__all__ = ["Action", "Drop", "Issue", "Lease", "Load", "Push", "Rule", "Schedule"]


class Schedule:
    """Has explorers work through an order of groups, and says when they load and when the trainer pushes.

    Args:
        order: The groups.
        samples: Number of samples of a group.

    Example:
        >>> class OnPolicy(Rule):
        ...     max_staleness = 0
        ...     def admit(self, batch): return batch
        ...     def pushes_after(self, batch): return True
        >>> schedule = Schedule(Order(OnPolicy(), size=lambda batch: 1))
        >>> schedule.joined(0) + schedule.wanted(0)
        []
        >>> schedule.loaded(0, 0) + schedule.pushed(0)
        [Issue(group=GroupKey(batch=0, slot=0), explorer=0, oldest=0)]
        >>> schedule.ready(GroupKey(0, 0))
        [Lease(batch=0, groups=(GroupKey(batch=0, slot=0),))]
        >>> schedule.trained(0)
        [Push(version=1)]
    """

    def __init__(self, order: Order, samples: int = 1) -> None:
        self.order = order
        self.pushed_version = -1
        self.push_pending = False  # from the batch that makes a push due until the push
        self.rule = order.rule
        #: Whether explorers get no work for now, since they sleep.
        self.paused = False
        self._samples = samples
        self._explorers: dict[int, Member] = {}
        self._unusable: list[Action] = [Drop(group, None) for group in order.unusable]  # with the first event
        self._wanted: int | None = None
        self._due: int | None = None

    # Events

    def joined(self, explorer: int, room: int | None = None) -> list[Action]:
        """An explorer is up, with a new index; it gets work once it has loaded a version.

        It gets a group as soon as fewer than ``room`` samples are open, even if the group has more samples than fit:
        what is issued late may be explored by others, or with newer weights.
        """
        self._explorers[explorer] = Member(inf if room is None else room)
        return self._actions()

    def died(self, explorer: int, kept: Collection[GroupKey] = ()) -> list[Action]:
        """An explorer is gone; its groups go to others, which go on with tokens that were ``kept`` of some."""
        for group in self._explorers.pop(explorer).groups:
            self.order.repeat(group, kept=group in kept)
        return self._actions()

    def loaded(self, explorer: int, version: int, alone: bool = False) -> list[Action]:
        """An explorer computes with ``version`` from now on.

        ``alone`` says that it came between two pushes and loaded by itself: the version counts at once, though it may
        never be pushed.
        """
        member = self._explorers[explorer]
        if version < member.loaded:
            raise ScheduleError(f"explorer {explorer} went back from version {member.loaded} to {version}")
        if version > self.version:
            raise ScheduleError(f"explorer {explorer} loaded version {version}, but only {self.version} exists")
        member.loaded, member.loading, member.alone = version, False, alone
        return self._actions()

    def samples_ended(self, ended: Mapping[GroupKey, int]) -> list[Action]:
        """Samples of groups that have yet to come back have ended, which makes room for others."""
        for group, number in ended.items():
            groups = self._at_work_on(group).groups
            if not 0 < number <= groups[group]:
                raise ScheduleError(f"{number} samples of {group} have ended, of {groups[group]} that had not")
            groups[group] -= number
        return self._actions()

    def ready(self, group: GroupKey, version: int | None = None, score: float = 0.0) -> list[Action]:
        """A group came back with its experience; ``version``, if given, is the oldest version of its tokens.

        Asynchronous steps train groups with the highest scores first unless that makes another too old.
        """
        del self._at_work_on(group).groups[group]
        self.order.ready(group, version, score)
        return self._actions()

    def failed(self, group: GroupKey) -> list[Action]:
        """A group came back without experience; it is issued again."""
        del self._at_work_on(group).groups[group]
        self.order.repeat(group)
        return self._actions()

    def wanted(self, batch: int) -> list[Action]:
        """The trainer waits for ``batch``."""
        if batch != self.version:
            raise ScheduleError(f"batch {batch} was asked for with version {self.version}: it must be the same number")
        self._wanted = batch
        return self._actions()

    def trained(self, batch: int) -> list[Action]:
        """``batch`` is part of the weights now, even if it did not change them."""
        if batch != self.version:
            raise ScheduleError(f"batch {batch} was trained by version {self.version}: batches must come in order")
        self.order.trained(batch)
        if self.rule.pushes_after(batch):
            self._due = self.version
            self.push_pending = not self.rule.asynchronous
        return self._actions()

    def pushed(self, version: int) -> list[Action]:
        """``version`` was pushed to every explorer, or made ready to load if pushes happen in the background."""
        newest = version <= self.version if self.rule.asynchronous else version == self.version
        if not newest or version <= self.pushed_version:
            raise ScheduleError(
                f"version {version} was pushed after {self.pushed_version}, with the trainer at {self.version}"
            )
        self.pushed_version = version
        if self._due is not None and self._due <= version:
            self._due = None
        self.push_pending = False
        return self._actions()

    def resume(self) -> list[Action]:
        """Explorers that were :attr:`paused` can work again."""
        self.paused = False
        return self._actions()

    # Answers

    @property
    def version(self) -> int:
        """Batches trained so far."""
        return self.order.version

    @property
    def idle(self) -> bool:
        """Whether explorers have no work, and can have none before something is trained or pushed."""
        working = any(member.groups for member in self._explorers.values())
        return not working and all(floor > self.pushed_version for _, floor in self.order.candidates())

    @property
    def explorers(self) -> list[int]:
        """Explorers that have joined and not died."""
        return list(self._explorers)

    def waits_for(self, explorer: int) -> str | None:
        """Why an explorer is idle: ``"load"``, ``"weights"``, ``"room"`` or at the end ``"nothing"``; None at work."""
        member = self._explorers[explorer]
        if member.groups:
            return None
        return "load" if member.loading else self.order.held_up_by

    def _actions(self) -> list[Action]:
        unusable, self._unusable = self._unusable, []
        return [*unusable, *self._leases(), *self._loads(), *self._issues(), *self._pushes()]

    # Who works on what

    def _explorer_of(self, group: GroupKey) -> int | None:
        return next((index for index, member in self._explorers.items() if group in member.groups), None)

    def _at_work_on(self, group: GroupKey) -> Member:
        explorer = self._explorer_of(group)
        if explorer is None:
            raise ScheduleError(f"{group} was heard of, but no explorer was asked for it")
        return self._explorers[explorer]

    def _issues(self) -> list[Action]:
        issues: list[Action] = []
        if self.paused:
            return issues
        resting, soon = self._resting(), self._soon()
        for group, floor in self.order.candidates():
            able = {
                index
                for index, member in self._explorers.items()
                if floor <= self._usable(member) and index not in resting and member.room > 0
            }
            # The one with most room is waited for if it is about to load.
            explorer = min(able | soon, key=lambda index: (*self._busy(index), index not in able, index), default=-1)
            if explorer in able:
                member = self._explorers[explorer]
                member.groups[group] = self._samples
                oldest = self.order.issue(group, member.loaded)
                issues.append(Issue(group, explorer, oldest))
        return issues

    def _usable(self, member: Member) -> int:
        """The version that an explorer may be used with, -1 for none.

        A version counts once it is pushed: otherwise the first explorer to load it would get everything. One that was
        loaded alone counts at once, but as no newer than what is pushed: a push must not find the explorer at work on
        groups that need it.
        """
        if member.alone:
            return min(member.loaded, self.pushed_version)
        return member.loaded if member.loaded <= self.pushed_version else -1

    # Who loads when

    def _turns(self) -> list[int]:
        """Explorers whose turn it is to load."""
        members = self._explorers
        lagging = [index for index, member in members.items() if member.loaded < self.pushed_version]
        if self.rule.loading >= 1:
            return lagging
        turns = [index for index in lagging if members[index].loading]
        if turns and self.rule.in_flight:
            return turns  # they began together, in one push, and the next ones begin when all of these have loaded
        others = sorted(set(lagging) - set(turns), key=lambda index: (members[index].loaded, index))
        return turns + others[: max(0, self.rule.loads_at_once(len(members)) - len(turns))]

    def _loads(self) -> list[Action]:
        loads: list[Action] = []
        for index in self._turns():
            member = self._explorers[index]
            if not member.loading and self._can_load(member):
                member.loading = True
                loads.append(Load(index, self.pushed_version))
        return loads

    def _can_load(self, member: Member) -> bool:
        return self.rule.in_flight or not member.groups

    def _busy(self, explorer: int) -> tuple[float, int]:
        """A key that sorts explorers, the one with most room first."""
        member = self._explorers[explorer]
        return -member.room, member.load

    def _soon(self) -> set[int]:
        """Explorers that load, or will when it is their turn, without waiting for the trainer."""
        if not self.rule.asynchronous:
            return set()
        return {
            index
            for index, member in self._explorers.items()
            if member.room > 0
            and (member.loading or (member.loaded < self.pushed_version and (self.rule.in_flight or not member.groups)))
        }

    def _resting(self) -> set[int]:
        """Explorers that get no work, because they load or must finish what they have to load."""
        turns = set() if self.rule.in_flight else set(self._turns())
        return turns | {index for index, member in self._explorers.items() if member.loading}

    # What is trained

    def _leases(self) -> list[Action]:
        if self._wanted is None:
            return []
        batch, groups = self._wanted, self.order.lease(self._wanted)
        if not groups:
            return []
        self._wanted = None
        return [Lease(batch, groups), *(self._drops() if self.rule.asynchronous else [])]

    def _drops(self) -> list[Action]:
        drops: list[Action] = []
        for group in self.order.drop_overdue():
            explorer = self._explorer_of(group)
            if explorer is not None:
                del self._explorers[explorer].groups[group]
            drops.append(Drop(group, explorer))
        return drops

    # When weights go back

    def _pushes(self) -> list[Action]:
        """Holds back a due version until no group that belongs to older weights is open.

        Otherwise the replacement of a failed group would be explored with newer weights than its batch, and versions
        would not repeat from run to run. It does not wait for groups held back by a full buffer, for which the trainer
        must make room, which waits for this push.
        """
        if self._due is None:
            return []
        strict = not self.rule.asynchronous and not self.rule.in_flight
        if strict and self.order.needs_older(self._due):
            return []
        version, self._due = self._due, None
        return [Push(version)]
