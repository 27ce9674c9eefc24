"""The schedule: a pure state machine that decides who explores which group when, and when weights are pushed.

Events go in as method calls, actions come out as values. It knows no clock, process or tensor, so tests drive it with
a clock of their own.

Batches are numbered 0, 1, ...; version ``v`` of the policy has been trained on ``v`` batches. Two answers of a strategy
decide nearly everything (see :class:`Rule`): an explorer may start a group of batch ``b`` once it has itself loaded a
version >= ``admit(b)``, and the trainer pushes after the batches for which ``pushes_after`` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import inf

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import GroupKey, Progress
from lightning_rft.sync.actions import Action, Drop, Issue, Lease, Load, Push
from lightning_rft.sync.feasibility import best_groups, moved_groups, would_be_late
from lightning_rft.sync.member import Member
from lightning_rft.sync.rule import Rule, check_rule, checked_batches

__all__ = ["Action", "Drop", "Issue", "Lease", "Load", "Push", "Rule", "Schedule"]


class Schedule:
    """Admits, assigns and accounts for groups.

    Raises ConfigurationError if the rule or the capacity can never make progress, and ScheduleError if ``progress`` and
    ``ready`` contradict each other, themselves or the rule's bound.

    Args:
        rule: The strategy's answers.
        size: Number of groups of a batch, at least 1.
        samples: Number of samples of a group.
        stop: Batches before ``stop`` exist; ``None`` for no end.
        capacity: Maximum groups issued and not yet trained. It limits issuing, never storing.
        progress: What is part of the weights at the start; groups left from earlier batches come first.
        ready: Stored groups that were not trained -> oldest version of their tokens. One that this rule cannot train in
            time is dropped and issued again.
        scores: Scores of the groups in ``ready``.

    Example:
        >>> class OnPolicy(Rule):
        ...     max_staleness = 0
        ...     def admit(self, batch): return batch
        ...     def pushes_after(self, batch): return True
        >>> schedule = Schedule(OnPolicy(), size=lambda batch: 1)
        >>> schedule.joined(0) + schedule.wanted(0)
        []
        >>> schedule.loaded(0, 0) + schedule.pushed(0)
        [Issue(group=GroupKey(batch=0, slot=0), explorer=0)]
        >>> schedule.ready(GroupKey(0, 0))
        [Lease(batch=0, groups=(GroupKey(batch=0, slot=0),))]
        >>> schedule.trained(0)
        [Push(version=1)]
    """

    def __init__(
        self,
        rule: Rule,
        *,
        size: Callable[[int], int],
        samples: int = 1,
        stop: int | None = None,
        capacity: int | None = None,
        progress: Progress | None = None,
        ready: Mapping[GroupKey, int] | None = None,
        scores: Mapping[GroupKey, float] | None = None,
    ) -> None:
        progress = progress or Progress(0)
        self.rule = rule
        self.version = progress.version  # batches trained so far
        self.pushed_version = -1
        self.push_pending = False  # from the batch that makes a push due until the push
        self._size = size
        self._samples = samples
        self._first = progress.version  # the oldest version there is
        self._stop = stop
        self._capacity = capacity
        self._explorers: dict[int, Member] = {}
        self._behind, self._ahead = set(progress.behind), set(progress.ahead)
        self._moved = moved_groups(progress, size)
        # An issued group is in one of the next four, with the version that it has, or will at least have.
        self._running: dict[GroupKey, int] = {}
        self._ready: dict[GroupKey, int] = {}
        self._leased: dict[GroupKey, int] = {}
        self._again: dict[GroupKey, int] = {}  # to be issued once more
        self._scores = dict(scores or {})  # of what is ready or leased
        self._wanted: int | None = None
        self._due: int | None = None
        check_rule(rule, self._first, stop)
        self._check_capacity()
        self._unusable = self._keep(ready or {}, progress)  # dropped with the first event
        self._passed = {*self._ready, *self._ahead}  # what is not issued when its turn comes
        self._next = GroupKey(self._first, 0)
        self._skip()
        for group in sorted(progress.behind - self._ready.keys()):
            if self._exists(self._step(group)):
                self._repeat(group, self._floor(self._turn))

    # Events

    def joined(self, explorer: int, room: int | None = None) -> list[Action]:
        """An explorer is up, with a new index; it gets work once it has loaded a version.

        It gets a group as soon as fewer than ``room`` samples are open, even if the group has more samples than fit:
        what is issued late may be explored by others, or with newer weights.
        """
        self._explorers[explorer] = Member(inf if room is None else room)
        return self._actions()

    def died(self, explorer: int) -> list[Action]:
        """An explorer is gone; its groups go to others."""
        for group in self._explorers.pop(explorer).groups:
            self._repeat(group, self._running.pop(group))
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
            groups = self._explorers[self._explorer_of(group)].groups
            if not 0 < number <= groups[group]:
                raise ScheduleError(f"{number} samples of {group} have ended, of {groups[group]} that had not")
            groups[group] -= number
        return self._actions()

    def ready(self, group: GroupKey, version: int | None = None, score: float = 0.0) -> list[Action]:
        """A group came back with its experience; ``version``, if given, is the oldest version of its tokens.

        Asynchronous steps train groups with the highest scores first unless that makes another too old.
        """
        issued = self._take_back(group)
        self._ready[group] = issued if version is None else version
        self._scores[group] = score
        return self._actions()

    def failed(self, group: GroupKey) -> list[Action]:
        """A group came back without experience; it is issued again."""
        self._repeat(group, self._take_back(group))
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
        of_batch = {GroupKey(batch, slot) for slot in range(self._size(batch))}
        self._behind |= of_batch - self._ahead
        self._behind -= self._leased.keys()
        self._ahead |= self._leased.keys()
        self._ahead = {group for group in self._ahead if group.batch > batch}
        for group in self._leased:
            self._scores.pop(group, None)
        self.version += 1
        self._leased = {}
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

    # Answers

    @property
    def progress(self) -> Progress:
        """What is part of the weights."""
        return Progress(self.version, frozenset(self._behind), frozenset(self._ahead))

    @property
    def explorers(self) -> list[int]:
        """Explorers that have joined and not died."""
        return list(self._explorers)

    def is_ready(self, batch: int) -> bool:
        """Whether every group of a batch has come back and can be trained."""
        return all(GroupKey(batch, slot) in self._ready for slot in range(self._size(batch)))

    def arrived(self, batch: int) -> tuple[int, int]:
        """How many groups that can be in a batch have come back, and how many it needs."""
        size = self._size(batch)
        ready = (
            self._ready if self.rule.asynchronous else [group for group in self._ready if self._step(group) == batch]
        )
        return min(len(ready), size), size

    def waits_for(self, explorer: int) -> str | None:
        """Why an explorer is idle: ``"load"``, ``"weights"``, ``"room"`` or at the end ``"nothing"``; None at work."""
        member = self._explorers[explorer]
        if member.groups:
            return None
        if member.loading:
            return "load"
        if not self._again and not self._exists(self._turn):
            return "nothing"
        return "room" if not self._again and self._full else "weights"

    # Which step trains what

    def _exists(self, batch: int) -> bool:
        return self._stop is None or batch < self._stop

    def _step(self, group: GroupKey) -> int:
        """The step that trains a group if batches keep their order."""
        return self._moved.get(group, group.batch)

    def trained_by(self, group: GroupKey) -> int:
        """The first step that can train a group that has come back."""
        return self.version if self.rule.asynchronous else self._step(group)

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

    def _repeat(self, group: GroupKey, version: int) -> None:
        """Has a group issued once more.

        In asynchronous training, with weights no older than the first time, so that its due step stands. Otherwise with
        any that its batch admits: newer ones may have been loaded by a late explorer alone, which is gone, and the push
        that would bring them to others waits for this group.
        """
        self._again[group] = version if self.rule.asynchronous else self._floor(self._step(group))

    def _check_capacity(self) -> None:
        largest = max((self._size(batch) for batch in checked_batches(self._first, self._stop)), default=0)
        if self._capacity is not None and self._capacity < largest:
            raise ConfigurationError(
                f"Buffer(capacity={self._capacity}) is below one batch of tasks_per_step={largest} groups, so no batch "
                f"could ever be completed: set capacity to at least {largest}"
            )

    def _keep(self, ready: Mapping[GroupKey, int], progress: Progress) -> list[Action]:
        """Takes over stored groups; returns what has to be dropped."""
        bound, drops = self.rule.max_staleness, list[Action]()
        for group, version in ready.items():
            if progress.trained(group) or not self._first - bound <= version <= self._first:
                raise ScheduleError(
                    f"{group} of version {version} cannot be ready for version {self._first}: it is trained already, "
                    f"from the future, or above max_staleness={bound}"
                )
            # Asynchronous training drops what is too old later, when that is certain.
            late = not self.rule.asynchronous and self._step(group) - version > bound
            if late or not self._exists(self._step(group)):
                drops.append(Drop(group, None))
            else:
                self._ready[group] = version
        return drops

    def _explorer_of(self, group: GroupKey) -> int:
        for index, member in self._explorers.items():
            if group in member.groups:
                return index
        raise ScheduleError(f"{group} was heard of, but no explorer was asked for it")

    def _take_back(self, group: GroupKey) -> int:
        del self._explorers[self._explorer_of(group)].groups[group]
        return self._running.pop(group)

    def _actions(self) -> list[Action]:
        unusable, self._unusable = self._unusable, []
        lease = self._lease()
        return [*unusable, *lease, *self._loads(), *self._issues(), *self._pushes()]

    # Who works on what

    def _issues(self) -> list[Action]:
        issues: list[Action] = []
        resting, soon = self._resting(), self._soon()
        for group, floor in self._candidates():
            able = {
                index
                for index, member in self._explorers.items()
                if floor <= self._usable(member) and index not in resting and member.room > 0
            }
            # The one with most room is waited for if it is about to load.
            explorer = min(able | soon, key=lambda index: (*self._busy(index), index not in able, index), default=-1)
            if explorer not in able:
                if group in self._again:
                    continue  # it may need newer weights than later groups do
                break  # admit never decreases, so no later group can be issued either
            member = self._explorers[explorer]
            if self._again.pop(group, None) is None:
                self._passed.add(group)
                self._skip()
            member.groups[group] = self._samples
            self._running[group] = member.loaded
            issues.append(Issue(group, explorer))
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

    def _candidates(self) -> Iterable[tuple[GroupKey, int]]:
        """Groups that could be issued, those to be repeated first, with the oldest version that may explore each."""
        yield from sorted(self._again.items())
        while self._exists(turn := self._turn) and not self._full:
            yield self._next, self._floor(turn)

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

    # Who loads when

    def _turns(self) -> list[int]:
        """Explorers whose turn it is to load."""
        members = self._explorers
        lagging = [index for index, member in members.items() if member.loaded < self.pushed_version]
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
                loads.append(Load(index, self.pushed_version))
        return loads

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

    def _complete(self, batch: int) -> bool:
        unfinished = (*self._running, *self._again)
        return self._turn > batch and not any(self._step(group) == batch for group in unfinished)

    def _lease(self) -> list[Action]:
        if self._wanted is None:
            return []
        batch = self._wanted
        if self.rule.asynchronous:
            groups = self._best(batch)
        elif self._complete(batch):
            groups = sorted(group for group in self._ready if self._step(group) == batch)
        else:
            return []
        if not groups:
            return []
        self._wanted = None
        self._leased = {group: self._ready.pop(group) for group in groups}
        return [Lease(batch, tuple(groups)), *(self._drops() if self.rule.asynchronous else [])]

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

    def _room(self, step: int) -> int:
        """How many groups a step trains."""
        return self._size(step) if self._exists(step) else 0

    def _drops(self) -> list[Action]:
        """Drops what will be too old once the leased batch is trained.

        If steps wait, those can only be groups kept on a resume under another rule.
        """
        oldest = self.version + 1 - self.rule.max_staleness
        drops: list[Action] = []
        for group in [group for group, version in self._running.items() if version < oldest]:
            explorer = self._explorer_of(group)
            self._repeat(group, max(self._take_back(group), oldest))
            drops.append(Drop(group, explorer))
        for group in [group for group, version in self._ready.items() if version < oldest]:
            self._repeat(group, max(self._ready.pop(group), oldest))
            drops.append(Drop(group, None))
        for group, version in self._again.items():
            self._again[group] = max(version, oldest)
        return drops

    # When weights go back

    def _pushes(self) -> list[Action]:
        """Holds back a due version until no group that belongs to older weights is open.

        Otherwise the replacement of a failed group would be explored with newer weights than its batch, and versions
        would not repeat from run to run. It does not wait for groups held back by a full buffer: only training makes
        room, and the trainer waits for this push.
        """
        if self._due is None:
            return []
        if not self.rule.asynchronous and not self.rule.in_flight:
            steps = [self._step(group) for group in (*self._running, *self._again)]
            if self._exists(self._turn) and not self._full:
                steps.append(self._turn)
            if any(self.rule.admit(step) < self._due for step in steps):
                return []
        version, self._due = self._due, None
        return [Push(version)]
