"""The schedule, event by event, and under a fake clock with everything that can go wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, count
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lightning_rft as rft
from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import GroupKey, Progress
from lightning_rft.sync.feasibility import best_groups, moved_groups
from lightning_rft.sync.order import Order
from lightning_rft.sync.schedule import Action, Drop, Issue, Lease, Load, Push, Rule, Schedule
from lightning_rft.sync.synchronous import Synchronous
from lightning_rft.testing import Crash, Event, check_events, check_strategy, drive


@dataclass(frozen=True)
class OneStepOff(Rule):
    """A rule as a user would write it: batch b + 1 is explored while b is trained."""

    k: int = 1

    @property
    def max_staleness(self) -> int:
        return self.k

    def admit(self, batch: int) -> int:
        return max(0, (batch - 1) // self.k * self.k)

    def pushes_after(self, batch: int) -> bool:
        return (batch + 1) % self.k == 0


@dataclass(frozen=True)
class Ahead(Rule):
    """Explores up to ``lead`` batches ahead; negative answers for the first ones, as a user would leave them."""

    lead: int

    @property
    def max_staleness(self) -> int:
        return self.lead

    def admit(self, batch: int) -> int:
        return batch - self.lead

    def pushes_after(self, batch: int) -> bool:
        return True


def started(
    rule: Rule, *, size: int = 2, explorers: int = 1, samples: int = 1, room: int | None = None, **settings: Any
) -> tuple[Schedule, list[Action]]:
    """A schedule whose first version is pushed, and what that led to."""
    schedule = Schedule(Order(rule, lambda batch: size, **settings), samples)
    version = schedule.version
    actions = [action for explorer in range(explorers) for action in schedule.joined(explorer, room)]
    actions += [action for explorer in range(explorers) for action in schedule.loaded(explorer, version)]
    return schedule, actions + schedule.pushed(version)


def issue(batch: int, slot: int, explorer: int = 0) -> Issue:
    return Issue(GroupKey(batch, slot), explorer)


def lease(batch: int, size: int = 2) -> Lease:
    return Lease(batch, tuple(GroupKey(batch, slot) for slot in range(size)))


def all_ready(schedule: Schedule, batch: int, size: int = 2) -> list[Action]:
    return [action for slot in range(size) for action in schedule.ready(GroupKey(batch, slot))]


# Event by event


def test_no_work_before_weights():
    schedule = Schedule(Order(Ahead(2), size=lambda batch: 1))
    assert schedule.joined(0) + schedule.wanted(0) == []
    assert schedule.waits_for(0) == "weights"
    assert schedule.loaded(0, 0) + schedule.pushed(0) == [issue(0, 0), issue(1, 0), issue(2, 0)]
    assert schedule.waits_for(0) is None


def test_explorers_that_load_together_share_the_work():
    _, actions = started(Synchronous(), size=5, explorers=2)
    assert actions == [issue(0, 0, 0), issue(0, 1, 1), issue(0, 2, 0), issue(0, 3, 1), issue(0, 4, 0)]


def test_least_loaded_explorer_gets_work():
    schedule, _ = started(Synchronous(2), size=2, explorers=2)  # groups 0.0 and 1.0 on explorer 0, the others on 1
    schedule.ready(GroupKey(0, 1))
    assert schedule.failed(GroupKey(0, 0)) == [issue(0, 0, 0)]
    schedule.ready(GroupKey(1, 1))
    assert schedule.failed(GroupKey(1, 0)) == [issue(1, 0, 1)]


def test_a_group_is_issued_when_there_is_room_for_one_of_its_samples():
    schedule, actions = started(Synchronous(), size=5, samples=8, room=12)
    assert actions == [issue(0, 0), issue(0, 1)]
    assert schedule.samples_ended({GroupKey(0, 1): 1, GroupKey(0, 0): 3}) == []
    assert schedule.samples_ended({GroupKey(0, 0): 1}) == [issue(0, 2)]
    assert schedule.samples_ended({GroupKey(0, 0): 4, GroupKey(0, 1): 3}) == []
    assert schedule.ready(GroupKey(0, 0)) == []  # its room was given away already
    assert schedule.samples_ended({GroupKey(0, 1): 1}) == [issue(0, 3)]
    assert schedule.failed(GroupKey(0, 1)) == []
    assert schedule.samples_ended({GroupKey(0, 2): 8}) == [issue(0, 1)]  # the lost one before new ones


def test_groups_that_are_larger_than_an_engine_are_explored_one_after_another():
    schedule, actions = started(Synchronous(), samples=33, room=16)
    assert actions == [issue(0, 0)]
    assert schedule.samples_ended({GroupKey(0, 0): 17}) == []
    assert schedule.samples_ended({GroupKey(0, 0): 1}) == [issue(0, 1)]


def test_the_explorer_with_most_room_for_samples_gets_work():
    schedule, actions = started(Synchronous(), size=8, samples=4, explorers=2, room=8)
    assert len(actions) == 4
    assert schedule.samples_ended({GroupKey(0, 0): 1, GroupKey(0, 1): 3}) == [issue(0, 4, 1), issue(0, 5, 0)]


@pytest.mark.parametrize(
    ("ended", "message"),
    [
        ({GroupKey(0, 0): 5}, "5 samples of .* have ended, of 4 that had not"),  # all again, where it is now
        ({GroupKey(0, 0): 0}, "0 samples of .* have ended"),
        ({GroupKey(0, 1): 1}, "no explorer was asked for it"),  # it has come back
        ({GroupKey(0, 2): 1}, "no explorer was asked for it"),  # its explorer died, and nobody has room
    ],
)
def test_samples_that_cannot_have_ended_are_refused(ended: dict[GroupKey, int], message: str):
    schedule, actions = started(Synchronous(), size=3, samples=4, explorers=3, room=4)
    assert actions == [issue(0, 0, 0), issue(0, 1, 1), issue(0, 2, 2)]
    schedule.samples_ended({GroupKey(0, 0): 2})
    schedule.ready(GroupKey(0, 1))
    schedule.joined(3, room=0)
    assert schedule.died(2) == [issue(0, 2, 1)]
    assert schedule.died(1) == [issue(0, 2, 0)]
    schedule.died(0)
    schedule.joined(4, room=1)
    assert schedule.loaded(4, 0) == [issue(0, 0, 4)]
    with pytest.raises(ScheduleError, match=message):
        schedule.samples_ended(ended)


def test_lease_needs_every_group_and_someone_who_wants_it():
    schedule, _ = started(Synchronous())
    assert schedule.ready(GroupKey(0, 1)) == []
    assert schedule.wanted(0) == []
    assert schedule.ready(GroupKey(0, 0)) == [lease(0)]
    schedule, _ = started(Synchronous())
    assert all_ready(schedule, 0) == []
    assert schedule.wanted(0) == [lease(0)]


def test_synchronous_publishes_every_k_and_explores_only_then():
    schedule, actions = started(Synchronous(2), size=1)
    assert actions == [issue(0, 0), issue(1, 0)]
    all_ready(schedule, 0, 1)
    all_ready(schedule, 1, 1)
    schedule.wanted(0)
    assert schedule.trained(0) == []
    assert not schedule.push_pending
    schedule.wanted(1)
    assert schedule.trained(1) == [Push(2)]
    assert schedule.push_pending
    assert schedule.loaded(0, 2) + schedule.pushed(2) == [issue(2, 0), issue(3, 0)]
    assert not schedule.push_pending


def test_due_push_waits_for_groups_that_belong_to_older_weights():
    schedule, actions = started(OneStepOff())
    assert actions == [issue(0, 0), issue(0, 1), issue(1, 0), issue(1, 1)]
    all_ready(schedule, 0)
    schedule.wanted(0)
    assert schedule.trained(0) == []
    assert schedule.push_pending
    assert schedule.ready(GroupKey(1, 0)) == []
    assert schedule.failed(GroupKey(1, 1)) == [issue(1, 1)]  # the replacement too
    assert schedule.ready(GroupKey(1, 1)) == [Push(1)]
    assert schedule.loaded(0, 1) + schedule.pushed(1) == [issue(2, 0), issue(2, 1)]


def test_due_push_does_not_wait_for_what_has_no_room():
    schedule, actions = started(Ahead(3), capacity=3)
    assert actions == [issue(0, 0), issue(0, 1), issue(1, 0)]
    all_ready(schedule, 0)
    schedule.wanted(0)
    assert schedule.trained(0) == [issue(1, 1), issue(2, 0)]
    assert all_ready(schedule, 1) == []
    assert schedule.ready(GroupKey(2, 0)) == [Push(1)]  # 2.1 and 3.* are admitted, but only training makes room


def test_due_push_waits_for_groups_that_nobody_could_be_given():
    schedule, _ = started(OneStepOff(), capacity=2)
    all_ready(schedule, 0)
    schedule.died(0)
    schedule.wanted(0)
    assert schedule.trained(0) == []
    schedule.joined(1)
    assert schedule.loaded(1, 0) == [issue(1, 0, 1), issue(1, 1, 1)]
    assert all_ready(schedule, 1) == [Push(1)]


def test_groups_of_a_dead_explorer_go_to_another_before_new_ones():
    schedule, actions = started(Synchronous(), size=4, explorers=2, capacity=4)
    assert Counter(action.explorer for action in actions if isinstance(action, Issue)) == {0: 2, 1: 2}
    assert schedule.died(1) == [issue(0, 1, 0), issue(0, 3, 0)]
    assert schedule.joined(1) == [Load(1, 0)]
    assert schedule.died(0) == []  # nobody has weights
    assert not schedule.push_pending
    assert schedule.loaded(1, 0) == [issue(0, slot, 1) for slot in range(4)]
    assert all_ready(schedule, 0, 4) + schedule.wanted(0) == [lease(0, 4)]


def test_first_stop_and_capacity_limit_issuing():
    schedule, actions = started(Ahead(10), size=2, progress=Progress(5), stop=7)
    assert [action.group for action in actions if isinstance(action, Issue)] == [(5, 0), (5, 1), (6, 0), (6, 1)]
    schedule, actions = started(Ahead(10), size=2, capacity=3)
    assert len(actions) == 3
    assert schedule.failed(GroupKey(0, 1)) == [issue(0, 1)]  # it was counted already
    assert all_ready(schedule, 0) == []
    schedule.wanted(0)
    assert schedule.trained(0) == [issue(1, 1), issue(2, 0)]
    assert started(Synchronous(), stop=0)[1] == []


def test_short_batches_are_complete_when_they_are():
    schedule = Schedule(Order(Synchronous(), size=lambda batch: 1 + batch % 2))
    schedule.joined(0)
    assert schedule.loaded(0, 0) + schedule.pushed(0) == [issue(0, 0)]
    assert all_ready(schedule, 0, 1) + schedule.wanted(0) == [lease(0, 1)]
    assert schedule.trained(0) == [Push(1)]
    assert schedule.loaded(0, 1) + schedule.pushed(1) == [issue(1, 0), issue(1, 1)]


def test_who_comes_between_two_pushes_loads_alone_and_explores_with_newer_weights():
    schedule, _ = started(Synchronous(2), size=1)
    all_ready(schedule, 0, 1)
    schedule.wanted(0)
    schedule.trained(0)
    assert schedule.died(0) == []
    assert schedule.joined(1) == [Load(1, 0)]
    assert schedule.loaded(1, 1, alone=True) == [issue(1, 0, 1)]  # version 1 is never pushed
    assert schedule.died(1) == []
    schedule.joined(2)
    assert schedule.loaded(2, 1, alone=True) == [issue(1, 0, 2)]
    assert schedule.ready(GroupKey(1, 0)) + schedule.wanted(1) == [lease(1, 1)]
    assert schedule.trained(1) == [Push(2)]
    assert schedule.loaded(2, 2) + schedule.pushed(2) == [issue(2, 0, 2), issue(3, 0, 2)]


def test_others_do_not_wait_for_who_waits_for_the_trainer():
    schedule, _ = started(Synchronous(2), size=1)
    schedule.joined(1)
    assert schedule.failed(GroupKey(0, 0)) == [issue(0, 0)]  # though explorer 1 would have more room
    schedule, _ = started(rft.FullyAsynchronous(), size=1)
    schedule.joined(1)
    assert schedule.failed(GroupKey(0, 0)) == []  # this one loads at once


def test_who_comes_while_a_push_is_held_back_explores_what_it_waits_for_and_no_more():
    schedule, _ = started(OneStepOff())
    all_ready(schedule, 0)
    schedule.wanted(0)
    assert schedule.trained(0) == []  # batch 1 is still explored
    assert schedule.died(0) == []
    schedule.joined(1)
    assert schedule.loaded(1, 1, alone=True) == [issue(1, 0, 1), issue(1, 1, 1)]
    assert all_ready(schedule, 1) == [Push(1)]  # and batch 2 waits for it, though its weights are there
    assert schedule.loaded(1, 1) + schedule.pushed(1) == [issue(2, 0, 1), issue(2, 1, 1)]


def test_a_lost_group_needs_no_weights_that_only_the_dead_had():
    schedule, _ = started(Synchronous(2), size=1, explorers=2)  # 0.0 on explorer 0, 1.0 on explorer 1
    all_ready(schedule, 0, 1)
    schedule.wanted(0)
    schedule.trained(0)
    schedule.joined(2, room=0)
    schedule.loaded(2, 1, alone=True)
    schedule.died(0)
    schedule.joined(3)
    schedule.loaded(3, 1, alone=True)
    assert schedule.failed(GroupKey(1, 0)) == [issue(1, 0, 1)]
    assert schedule.died(1) == [issue(1, 0, 3)]
    schedule.joined(4)
    schedule.loaded(4, 1)  # not alone: it counts once it is pushed
    assert schedule.died(3) == []


def test_explorers_that_die_while_a_push_goes_on_are_not_waited_for():
    schedule, _ = started(Synchronous(), size=1, explorers=3)
    all_ready(schedule, 0, 1)
    schedule.wanted(0)
    assert schedule.trained(0) == [Push(1)]
    assert schedule.died(0) + schedule.loaded(1, 1) + schedule.died(2) == []
    assert schedule.joined(3) == [Load(3, 0)]
    assert schedule.pushed(1) == [issue(1, 0, 1)]
    assert schedule.loaded(3, 1, alone=True) == []
    assert schedule.died(1) == [issue(1, 0, 3)]


def test_a_group_with_kept_tokens_is_as_old_as_they_are():
    schedule, _ = started(rft.FullyAsynchronous(max_staleness=2), size=1, explorers=2)
    running = schedule.order._running
    groups = sorted(running)
    assert len(groups) == 3 and set(running.values()) == {0}
    schedule.ready(groups[0])
    schedule.wanted(0)
    schedule.trained(0)
    schedule.pushed(1)
    schedule.loaded(1, 1)
    of_first = [group for group in groups[1:] if group in schedule._explorers[0].groups]
    assert of_first
    actions = schedule.died(0, kept=of_first)
    assert [action.oldest for action in actions if isinstance(action, Issue) and action.group in of_first] == [0]
    assert running[of_first[0]] == 0
    schedule.joined(2)
    schedule.loaded(2, 1)
    (again,) = [action for action in schedule.died(1) if isinstance(action, Issue) and action.group in of_first]
    assert again.oldest == 1 == running[of_first[0]]  # nothing was kept this time


def ready_with_scores(schedule: Schedule, scores: dict[tuple[int, int], float]) -> list[Action]:
    return [action for group, score in scores.items() for action in schedule.ready(GroupKey(*group), score=score)]


def test_the_best_come_first_unless_others_would_be_too_old():
    schedule, _ = started(rft.FullyAsynchronous(max_staleness=2))  # 0.* to 2.* are explored with version 0
    ready_with_scores(schedule, {(0, 0): 0.0, (0, 1): -1.0, (1, 0): 3.0, (1, 1): 0.0, (2, 0): 2.0, (2, 1): 0.0})
    assert schedule.wanted(0) == [Lease(0, (GroupKey(1, 0), GroupKey(2, 0)))]
    schedule.trained(0)
    schedule.pushed(1)
    schedule.loaded(0, 1)
    ready_with_scores(schedule, {(3, 0): 9.0, (3, 1): 9.0})  # of version 1
    # four are due by step 2, which has room for two
    assert schedule.wanted(1) == [Lease(1, (GroupKey(0, 0), GroupKey(1, 1)))]


def test_the_best_are_taken_from_what_a_resumed_run_kept():
    ready = {GroupKey(6, 0): 5, GroupKey(5, 0): 5, GroupKey(5, 1): 5}
    rule, scores = rft.FullyAsynchronous(max_staleness=2), {GroupKey(6, 0): 1.0}
    schedule, _ = started(rule, progress=Progress(5), ready=ready, scores=scores)
    assert schedule.wanted(5) == [Lease(5, (GroupKey(5, 0), GroupKey(6, 0)))]


def test_scores_change_nothing_where_order_is_kept():
    schedule, _ = started(OneStepOff())
    schedule.wanted(0)
    assert ready_with_scores(schedule, {(1, 0): 9.0, (1, 1): 9.0, (0, 0): 0.0, (0, 1): 1.0}) == [lease(0)]


@settings(max_examples=500, deadline=None)
@given(
    ready=st.dictionaries(st.builds(GroupKey, st.integers(0, 4), st.integers(0, 2)), st.integers(0, 4), max_size=9),
    unfinished=st.lists(st.integers(0, 4), max_size=4),
    values=st.lists(st.integers(0, 3), min_size=9, max_size=9),
    bound=st.integers(0, 4),
    step=st.integers(0, 5),
    sizes=st.lists(st.integers(1, 3), min_size=10, max_size=10),
)
def test_no_choice_that_leaves_as_much_room_has_higher_scores(
    ready: dict[GroupKey, int], unfinished: list[int], values: list[int], bound: int, step: int, sizes: list[int]
):
    """Against all choices there are."""
    ready = {group: version for group, version in ready.items() if version + bound >= step}
    size, oldest = sizes[step], sorted(ready, key=lambda group: (ready[group], group))
    assume(len(ready) >= size)
    scores = dict(zip(ready, map(float, values), strict=False))

    def too_late(chosen: Sequence[GroupKey]) -> list[int]:
        """For each due step: how many more than there is room for are left."""
        left = [*(version for group, version in ready.items() if group not in chosen), *unfinished]
        dues = range(step, max([*ready.values(), *unfinished]) + bound + 1)
        room = [sum(sizes[later] for later in range(step + 1, due + 1)) for due in dues]
        late = [sum(version + bound <= due for version in left) for due in dues]
        return [max(0, number - places) for number, places in zip(late, room, strict=True)]

    def best(scores: dict[GroupKey, float]) -> list[GroupKey]:
        room = dict(enumerate(sizes)).get
        return best_groups(ready, unfinished, scores, bound=bound, step=step, room=lambda step: room(step, 0))

    least = too_late(oldest[:size])  # nothing leaves less behind than the oldest
    as_good = [choice for choice in combinations(oldest, size) if too_late(choice) == least]
    chosen = best(scores)
    assert tuple(chosen) in as_good
    assert sum(map(scores.__getitem__, chosen)) == max(sum(map(scores.__getitem__, choice)) for choice in as_good)
    assert best({}) == best(dict.fromkeys(ready, 1.0)) == oldest[:size]


def test_progress_is_what_was_trained_in_whatever_order():
    schedule, _ = started(rft.FullyAsynchronous(max_staleness=2))  # batches 0 to 2 are explored with version 0
    steps = [
        ([(0, 0), (1, 1)], {(0, 1)}, {(1, 1)}),
        ([(2, 0), (2, 1)], {(0, 1), (1, 0)}, {(2, 0), (2, 1)}),
        ([(0, 1), (1, 0)], set(), set()),
    ]
    assert schedule.order.progress == Progress(0)
    for batch, (groups, behind, ahead) in enumerate(steps):
        for group in groups:
            schedule.ready(GroupKey(*group))
        assert schedule.wanted(batch) == [Lease(batch, tuple(GroupKey(*group) for group in groups))]
        schedule.trained(batch)
        assert schedule.order.progress == Progress(batch + 1, frozenset(behind), frozenset(ahead))  # type: ignore[arg-type]


# Resumed

HOLES = Progress(5, frozenset({GroupKey(3, 1), GroupKey(4, 0)}), frozenset({GroupKey(5, 1), GroupKey(7, 0)}))


def resumed(rule: Rule, ready: dict[GroupKey, int] | None = None, **settings: Any) -> tuple[Schedule, list[Action]]:
    return started(rule, progress=HOLES, ready=ready, **settings)


def test_groups_that_were_left_come_first_and_shift_the_others():
    assert moved_groups(HOLES, lambda batch: 2) == {
        GroupKey(3, 1): 5,
        GroupKey(4, 0): 5,
        GroupKey(5, 0): 6,
        GroupKey(6, 1): 7,
    }
    assert moved_groups(Progress(9), lambda batch: 2) == {}


def test_an_asynchronous_run_goes_on_with_what_is_left():
    schedule, actions = resumed(rft.FullyAsynchronous(max_staleness=1), {GroupKey(5, 0): 4})
    assert schedule.order.progress == HOLES
    assert actions == [issue(3, 1), issue(4, 0), issue(6, 0)]  # 6.1 has its turn in step 7, and needs version 6
    assert schedule.wanted(5) == []
    assert schedule.ready(GroupKey(3, 1)) == [Lease(5, (GroupKey(5, 0), GroupKey(3, 1)))]
    assert schedule.trained(5) == [Push(6)]
    assert schedule.order.progress == Progress(6, frozenset({GroupKey(4, 0)}), frozenset({GroupKey(7, 0)}))


def test_what_was_left_and_has_its_turn_later_is_explored_with_newer_weights():
    holes = Progress(5, frozenset({GroupKey(3, 0), GroupKey(4, 0)}), frozenset({GroupKey(5, 0), GroupKey(6, 0)}))
    schedule, actions = started(rft.FullyAsynchronous(max_staleness=0), size=1, progress=holes)
    assert actions == [issue(3, 0)]  # 4.0 has its turn in step 6
    schedule.wanted(5)
    assert schedule.ready(GroupKey(3, 0)) == [Lease(5, (GroupKey(3, 0),))]
    schedule.trained(5)
    assert schedule.pushed(6) == [Load(0, 6)]
    assert schedule.loaded(0, 6) == [issue(4, 0)]


def test_what_was_kept_is_trained_before_what_is_new():
    schedule, _ = started(
        rft.FullyAsynchronous(max_staleness=0), size=1, explorers=0, progress=Progress(5), ready={GroupKey(6, 0): 5}
    )
    assert schedule.wanted(5) == [Lease(5, (GroupKey(6, 0),))]
    schedule.joined(0)
    assert schedule.loaded(0, 5) == []  # 5.0 has its turn in step 6 now
    assert schedule.trained(5) == [Push(6)]
    assert schedule.order.progress == Progress(6, frozenset({GroupKey(5, 0)}), frozenset({GroupKey(6, 0)}))
    schedule.pushed(6)
    assert schedule.loaded(0, 6) == [issue(5, 0)]


def test_a_synchronous_run_goes_on_with_what_an_asynchronous_one_left():
    schedule, actions = resumed(Synchronous(), {GroupKey(4, 0): 5, GroupKey(5, 0): 5}, capacity=2)
    assert schedule.order.progress == HOLES
    # 5.0 has its turn in step 6, and is explored again with version 6
    assert actions == [Drop(GroupKey(5, 0), None), issue(3, 1)]
    assert schedule.wanted(5) == []
    assert schedule.ready(GroupKey(3, 1)) == [Lease(5, (GroupKey(3, 1), GroupKey(4, 0)))]
    assert schedule.trained(5) == [Push(6)]
    assert schedule.order.progress == Progress(6, frozenset({GroupKey(5, 0)}), frozenset({GroupKey(7, 0)}))
    assert schedule.loaded(0, 6) + schedule.pushed(6) == [issue(5, 0), issue(6, 0)]


def test_what_a_rule_cannot_train_in_time_is_dropped():
    schedule = Schedule(Order(Synchronous(), lambda batch: 2, progress=HOLES, ready={GroupKey(5, 0): 5}, stop=8))
    assert schedule.joined(0) == [Drop(GroupKey(5, 0), None)]
    assert schedule.joined(1) == []
    # past the end
    ready = {GroupKey(4, 0): 3}
    schedule = Schedule(Order(rft.FullyAsynchronous(), lambda batch: 1, progress=Progress(3), stop=4, ready=ready))
    assert schedule.joined(0) == [Drop(GroupKey(4, 0), None)]
    # three that are due in step 3, of which one has room
    ready = {GroupKey(3, 0): 3, GroupKey(4, 0): 3, GroupKey(5, 0): 3}
    schedule, actions = started(rft.FullyAsynchronous(max_staleness=0), size=1, progress=Progress(3), ready=ready)
    assert actions == []
    drops = [Drop(GroupKey(4, 0), None), Drop(GroupKey(5, 0), None)]
    assert schedule.wanted(3) == [lease(3, 1), *drops]


def test_kept_groups_never_take_the_room_of_the_next_batch():
    kept = {GroupKey(batch, 1): 5 for batch in (5, 6, 7)}
    schedule, actions = started(Ahead(3), capacity=2, progress=Progress(5), ready=kept)
    assert actions == [issue(5, 0)]
    schedule.wanted(5)
    assert schedule.ready(GroupKey(5, 0)) == [lease(5)]
    assert schedule.trained(5) == [issue(6, 0)]


@pytest.mark.parametrize(
    ("progress", "ready", "message"),
    [
        (Progress(2, behind=frozenset({GroupKey(0, 0)})), {}, "1 groups behind and 0 ahead of version 2 cannot be"),
        (Progress(1, frozenset({GroupKey(1, 0)}), frozenset({GroupKey(2, 0)})), {}, "1 groups behind and 1 ahead"),
        (Progress(1, frozenset({GroupKey(0, 0)}), frozenset({GroupKey(0, 1)})), {}, "1 groups behind and 1 ahead"),
        (Progress(4), {GroupKey(3, 0): 4}, "cannot be ready .* trained already"),
        (Progress(4), {GroupKey(4, 0): 5}, "from the future"),
        (Progress(4), {GroupKey(4, 0): 2}, "above max_staleness=1"),
    ],
)
def test_a_resume_that_cannot_be_is_refused(progress: Progress, ready: dict[GroupKey, int], message: str):
    with pytest.raises(ScheduleError, match=message):
        Order(OneStepOff(), size=lambda batch: 2, progress=progress, ready=ready)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (lambda schedule: schedule.wanted(1), "batch 1 was asked for with version 0"),
        (lambda schedule: schedule.trained(1), "batch 1 was trained by version 0"),
        (lambda schedule: schedule.pushed(1), "version 1 was pushed after 0, with the trainer at 0"),
        (lambda schedule: schedule.loaded(0, -1), "explorer 0 went back from version 0 to -1"),
        (lambda schedule: schedule.loaded(0, 1), "explorer 0 loaded version 1, but only 0 exists"),
        (lambda schedule: schedule.ready(GroupKey(3, 0)), "no explorer was asked for it"),
        (lambda schedule: (schedule.ready(GroupKey(0, 0)), schedule.ready(GroupKey(0, 0))), "no explorer was asked"),
    ],
)
def test_what_cannot_be_is_refused(event: Callable[[Schedule], Any], message: str):
    schedule, _ = started(Synchronous())
    with pytest.raises(ScheduleError, match=message):
        event(schedule)


def test_capacity_below_a_batch_is_refused():
    with pytest.raises(ConfigurationError, match=r"capacity=3\) .* at least 4"):
        Order(Synchronous(), size=lambda batch: 4, capacity=3)
    with pytest.raises(ConfigurationError, match=r"at least 4"):  # though the first batch is a short one
        Order(Synchronous(), size=lambda batch: 4 if batch else 1, capacity=3)
    Order(Synchronous(), size=lambda batch: 4, capacity=4)
    Order(Synchronous(), size=lambda batch: 4, capacity=3, stop=0)  # nothing will be issued


# Under a fake clock


def test_one_step_off_policy_overlaps_and_synchronous_does_not():
    times = {"duration": lambda group, attempt: 3.0, "train_time": 2.0, "batches": 5}
    assert drive(Synchronous(), **times)[-1].time == 5 * (3 + 2)
    # the first two rollouts at once, the first step, then the longer of the two each time, the last step
    assert drive(OneStepOff(), **times)[-1].time == 3 + 2 + 3 * 3 + 2


def test_a_second_explorer_does_not_idle():
    events = drive(Synchronous(2), batches=4, groups_per_batch=4, explorers=2)
    assert Counter(event.explorer for event in events if event.what == "issued") == {0: 8, 1: 8}


def test_driver_reports_a_deadlock():
    class Never(OneStepOff):
        def pushes_after(self, batch: int) -> bool:
            return False

    with pytest.raises(ConfigurationError, match=r"Never could never train batch 2: admit\(2\) asks for version 1"):
        drive(Never(), batches=4)
    with pytest.raises(ScheduleError, match="deadlock"):
        drive(Synchronous(), batches=2, deaths=[(1.5, 0)])
    assert drive(Synchronous(), batches=2, deaths=[(1.5, 0)], joins=[(9.0, 1)])[-1].time > 9


CIRCUMSTANCES: dict[str, Any] = {
    "explorers": st.integers(1, 3),
    "batches": st.integers(1, 12),
    "sizes": st.lists(st.integers(1, 5), min_size=1, max_size=3),
    "room": st.none() | st.integers(0, 12),
    "failure_rate": st.sampled_from([0.0, 0.1, 0.5]),
    "train_time": st.sampled_from([0.0, 1.0, 20.0]),
    "push_time": st.sampled_from([0.0, 0.5, 5.0]),
    # who dies when (the first replacements too), and how long it takes to replace them
    "outages": st.lists(st.tuples(st.floats(0, 60), st.integers(0, 4), st.floats(0, 20)), max_size=5),
    "late": st.lists(st.floats(0, 60), max_size=2),
    "most": st.sampled_from([None, 1, 2, 5]),
    "samples": st.sampled_from([1, 1, 2, 4]),
    "score_time": st.sampled_from([0.0, 0.5]),
    "scored": st.booleans(),
    "keeps": st.booleans(),
    "seed": st.integers(0, 2**32),
}

RULES = st.one_of(
    st.builds(Synchronous, sync_interval=st.sampled_from([1, 2, 4])),
    st.builds(OneStepOff, st.sampled_from([1, 2, 4])),
    st.builds(Ahead, st.integers(0, 4)),
)


def run(
    rule: Any,
    *,
    explorers: int,
    batches: int,
    sizes: list[int],
    room: int | None,
    failure_rate: float,
    train_time: float,
    push_time: float,
    outages: list[tuple[float, int, float]],
    late: list[float],
    most: int | None,
    samples: int,
    score_time: float,
    scored: bool,
    keeps: bool,
    seed: int,
    crashes: Sequence[Crash] = (),
) -> tuple[list[Event], Callable[[int], int], int | None]:
    def draw(*about: Any) -> random.Random:
        return random.Random(repr((seed, *about)))

    def size(batch: int) -> int:
        return sizes[batch % len(sizes)]

    capacity = None if room is None else max(sizes) + room
    events = drive(  # returns, so nothing deadlocked
        rule,
        batches=batches,
        groups_per_batch=size,
        explorers=explorers,
        samples=samples,
        duration=lambda *about: [draw("duration", *about, sample).paretovariate(1.1) for sample in range(samples)],
        score_time=score_time,
        train_time=train_time,
        push_time=push_time,
        fails=lambda group, attempt: draw("fails", group, attempt).random() < failure_rate,
        deaths=[(when, explorer) for when, explorer, _ in outages],
        joins=[(when + away, explorers + number) for number, (when, _, away) in enumerate(outages)]
        + [(when, 100 + number) for number, when in enumerate(late)],
        crashes=crashes,
        capacity=capacity,
        room=most,
        score=lambda group: draw("score", group).random() if scored else 0.0,
        keeps=keeps,
    )
    return events, size, capacity


@settings(max_examples=300, deadline=None)
@given(rule=RULES, circumstances=st.fixed_dictionaries(CIRCUMSTANCES))
def test_every_run_keeps_the_promises(rule: Any, circumstances: dict[str, Any]):
    events, size, capacity = run(rule, **circumstances)
    check(rule, events, circumstances["batches"], size, capacity, circumstances["most"], circumstances["samples"])


INTERVALS = st.sampled_from([1, 2, 4])


@st.composite
def shipped(draw: st.DrawFn) -> rft.SyncStrategy:
    """Any strategy with any options."""
    make = draw(st.sampled_from([Synchronous, rft.OneStepOffPolicy, *ASYNCHRONOUS]))
    interval = draw(INTERVALS)
    if make is Synchronous:
        return Synchronous(interval)
    if make is rft.OneStepOffPolicy:
        return rft.OneStepOffPolicy(interval, in_flight=draw(st.booleans()))
    takes_turns = make is rft.MultiExplorerAsynchronous
    return make(
        interval,
        max_staleness=interval - 1 + draw(st.integers(0, 4)),
        overdue=draw(st.sampled_from(["wait", "wait", "drop"])),
        in_flight=draw(st.booleans()),
        **({"loading": draw(st.sampled_from([0.25, 0.7]))} if takes_turns else {}),  # of three, one or two
    )


ASYNCHRONOUS = [rft.FullyAsynchronous, rft.MultiExplorerAsynchronous]


@settings(max_examples=1000, deadline=None)
@given(rule=shipped(), circumstances=st.fixed_dictionaries(CIRCUMSTANCES))
def test_every_strategy_keeps_the_rules(rule: rft.SyncStrategy, circumstances: dict[str, Any]):
    events, size, _ = run(rule, **circumstances)
    check_events(rule, events, batches=circumstances["batches"], groups_per_batch=size)
    undisturbed = not circumstances["outages"] and not circumstances["failure_rate"] and rule.overdue == "wait"
    if undisturbed:  # then every length that was asked for is trained
        assert max(Counter(event.group for event in events if event.what == "issued").values()) == 1


CRASHES = st.builds(Crash, st.floats(0, 60), st.integers(0, 5), st.none())
SWAPS = st.builds(Crash, st.floats(0, 60), st.integers(0, 5), shipped())


@settings(max_examples=1000, deadline=None)
@given(
    rule=shipped(),
    circumstances=st.fixed_dictionaries(CIRCUMSTANCES),
    crashes=st.lists(CRASHES, min_size=1, max_size=3) | st.lists(CRASHES | SWAPS, min_size=1, max_size=3),
)
def test_every_strategy_keeps_the_rules_through_resumes(
    rule: rft.SyncStrategy, circumstances: dict[str, Any], crashes: list[Crash]
):
    events, size, _ = run(rule, crashes=crashes, **circumstances)
    check_events(rule, events, batches=circumstances["batches"], groups_per_batch=size, crashes=crashes)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_versions_repeat_exactly_in_strategies_that_keep_order(k: int):
    for rule in (Synchronous(k), rft.OneStepOffPolicy(k)):
        for seed in range(20):
            lengths, failures = random.Random(seed), random.Random(seed)
            events = drive(
                rule,
                batches=9,
                groups_per_batch=3,
                explorers=1 + seed % 3,
                duration=lambda group, attempt, lengths=lengths: lengths.paretovariate(1.1),
                fails=lambda group, attempt, failures=failures: failures.random() < 0.2,
                train_time=seed % 5,
            )
            versions = {event.group: event.version for event in events if event.what == "ready"}
            assert versions == {GroupKey(b, slot): rule.admit(b) for b in range(9) for slot in range(3)}


def test_scores_are_heard_within_the_bound_and_starve_nobody():
    rule = rft.FullyAsynchronous(max_staleness=8)
    liked = {GroupKey(batch, slot) for batch in range(40) for slot in (1, 3)}  # two of four

    def mean_lags(score: Callable[[GroupKey], float], capacity: int | None = 16) -> tuple[float, float]:
        """Of the liked, and of the others."""
        events = drive(rule, batches=40, groups_per_batch=4, train_time=2.0, capacity=capacity, score=score)
        check_events(rule, events, batches=40, groups_per_batch=4)  # the bound among other things
        lags: dict[bool, list[int]] = {True: [], False: []}
        version = {event.group: event.version for event in events if event.what == "ready"}
        for event in events:
            for group in event.groups if event.what == "training" else ():
                lags[group in liked].append(event.version - version[group])
        return sum(lags[True]) / len(lags[True]), sum(lags[False]) / len(lags[False])

    first, others = mean_lags(lambda group: 0.0)
    assert first == others
    first, others = mean_lags(lambda group: float(group in liked))
    assert first < others / 2
    # explorers that keep up fill the bound when nothing else limits them, and then all is due in order
    first, others = mean_lags(lambda group: float(group in liked), capacity=None)
    assert first > others - 1


def long_tailed(overdue: Any) -> tuple[list[float], list[float]]:
    """How long the answers were that were asked for, and those that were trained."""
    lengths: dict[tuple[GroupKey, int], float] = {}

    def duration(group: GroupKey, attempt: int) -> float:
        return lengths.setdefault((group, attempt), random.Random(repr((group, attempt))).paretovariate(1.1))

    rule = rft.FullyAsynchronous(max_staleness=2, overdue=overdue)
    events = drive(rule, batches=200, groups_per_batch=4, duration=duration, train_time=1.0)
    attempts = Counter(event.group for event in events if event.what == "issued")
    last = {event.group: attempts[event.group] - 1 for event in events if event.what == "ready"}
    asked = [length for (_, attempt), length in lengths.items() if attempt == 0]
    return asked, [lengths[group, attempt] for group, attempt in last.items() if group is not None]


def test_waiting_trains_the_lengths_that_were_asked_for_and_dropping_does_not():
    asked, trained = long_tailed("wait")
    assert sorted(trained) == sorted(asked)
    asked, trained = long_tailed("drop")
    assert len(trained) == len(asked)
    assert sum(length > 10 for length in trained) < sum(length > 10 for length in asked) / 2


def test_asynchronous_strategies_wait_for_nobody_until_the_bound():
    times = {"duration": lambda group, attempt: 1.0, "train_time": 2.0, "batches": 10, "push_time": 0.5}
    # the first version is made loadable and loaded, one rollout, ten steps, the last version
    end = drive(rft.FullyAsynchronous(max_staleness=2), **times)[-1].time
    assert end == pytest.approx(2 * 0.5 + 1 + 10 * 2 + 0.5)
    # the slower side alone decides
    times |= {"duration": lambda group, attempt: 3.0, "train_time": 1.0}
    end = drive(rft.FullyAsynchronous(max_staleness=10), **times)[-1].time
    assert end == pytest.approx(2 * 0.5 + 3.0 + 10 * 1.0 + 0.5)  # all ten are explored at once


def test_staggered_explorers_never_stop_as_a_whole():
    events = drive(
        rft.MultiExplorerAsynchronous(max_staleness=3), batches=20, groups_per_batch=4, explorers=2, push_time=0.4
    )
    check_events(rft.MultiExplorerAsynchronous(max_staleness=3), events, batches=20, groups_per_batch=4)
    assert {event.explorer for event in events if event.what == "loaded"} == {0, 1}


def test_a_quarter_loads_at_a_time_and_the_next_when_all_of_these_have_loaded():
    schedule, actions = started(rft.MultiExplorerAsynchronous(max_staleness=1), size=8, explorers=8)
    assert [action for action in actions if isinstance(action, Load)] == []
    all_ready(schedule, 0, 8)
    schedule.wanted(0)
    schedule.trained(0)
    assert schedule.pushed(1)[:2] == [Load(0, 1), Load(1, 1)]
    assert not any(isinstance(action, Load) for action in schedule.loaded(1, 1))
    assert not any(isinstance(action, Load) for action in schedule.joined(8))  # it waits for its turn, too
    assert [action for action in schedule.died(0) if isinstance(action, Load)] == [Load(8, 1), Load(2, 1)]
    assert not any(isinstance(action, Load) for action in schedule.loaded(8, 1))
    assert [action.explorer for action in schedule.loaded(2, 1) if isinstance(action, Load)] == [3, 4]


def test_who_finishes_its_groups_first_loads_as_soon_as_it_has():
    rule = rft.MultiExplorerAsynchronous(max_staleness=1, in_flight=False, loading=0.5)
    schedule, actions = started(rule, size=4, explorers=4)  # two groups each
    assert Counter(action.explorer for action in actions if isinstance(action, Issue)) == dict.fromkeys(range(4), 2)
    all_ready(schedule, 0, 4)
    schedule.wanted(0)
    schedule.trained(0)
    assert schedule.pushed(1) == []  # it is the turn of 0 and 1, which get no more work
    assert schedule.ready(GroupKey(1, 1)) == [Load(1, 1)]
    assert schedule.ready(GroupKey(1, 2)) == []
    assert schedule.loaded(1, 1)[:1] == [Load(2, 1)]
    assert schedule.ready(GroupKey(1, 0)) == [Load(0, 1)]
    assert schedule.ready(GroupKey(1, 3)) == []


def test_many_explorers_are_faster_a_quarter_at_a_time():
    def run_of(loading: float) -> tuple[float, int]:
        """Seconds from the sixth step to the last, and how many explorers loaded at the same time at most."""
        rule = rft.MultiExplorerAsynchronous(max_staleness=2, loading=loading)
        lengths = random.Random(0)
        events = drive(
            rule,
            batches=10,
            groups_per_batch=64,
            explorers=64,
            duration=lambda group, attempt: lengths.uniform(5.0, 15.0),
            train_time=5.0,
            push_time=0.5,
            load_time=2.0,
            room=2,
        )
        check_events(rule, events, batches=10, groups_per_batch=64)
        loading_now, most = 0, 0
        for event in events:
            loading_now += (event.what == "loading") - (event.what == "loaded")
            most = max(most, loading_now)
        begins = [event.time for event in events if event.what == "training"]
        return begins[-1] - begins[5], most

    (one, most_of_one), (quarter, most_of_quarter) = run_of(0.001), run_of(0.25)
    assert (most_of_one, most_of_quarter) == (1, 16)
    assert quarter < one / 2


@pytest.mark.parametrize("make", ASYNCHRONOUS)
@pytest.mark.parametrize("in_flight", [True, False])
@pytest.mark.parametrize("train_time", [0.3, 3.0])
def test_the_first_to_load_does_not_take_all_the_work(make: Any, in_flight: bool, train_time: float):
    rule = make(in_flight=in_flight)
    times = {"duration": lambda group, attempt: 0.7 + 0.1 * group.slot, "train_time": train_time, "push_time": 0.2}
    events = drive(rule, batches=40, groups_per_batch=4, explorers=2, **times)
    share = Counter(event.explorer for event in events if event.what == "issued")
    assert min(share.values()) >= 60  # of 160
    if in_flight:  # waiting for another explorer's load costs little, though here a second one makes nothing faster
        alone = drive(rft.FullyAsynchronous(), batches=40, groups_per_batch=4, explorers=1, **times)
        assert events[-1].time <= alone[-1].time * 1.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rft.FullyAsynchronous(4, max_staleness=2), r"batch 3 would need version 1, .* at least .* = 3"),
        (lambda: rft.FullyAsynchronous(overdue="skip"), "overdue='skip': use 'wait' or 'drop'"),
        (lambda: rft.OneStepOffPolicy(0), "sync_interval=0 must be at least 1"),
        (lambda: rft.MultiExplorerAsynchronous().check(1), "two or more explorers"),
        (lambda: rft.MultiExplorerAsynchronous(loading=0.0), r"loading=0.0 must be above 0 and below 1"),
        (lambda: rft.MultiExplorerAsynchronous(loading=1), r"loading=1 must be .* FullyAsynchronous\(\) has all"),
        (lambda: rft.CheckpointTransport(keep=0), "keep at least 1"),
        (lambda: Order(TooStale(1), size=lambda batch: 1), r"admit\(2\) is 0: .* staleness of 2 .* max_staleness=1"),
        (lambda: Order(Backwards(1), size=lambda batch: 1), r"must never decrease"),
    ],
)
def test_what_can_never_work_is_refused(make: Callable[[], Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        make()


class TooStale(Ahead):
    def admit(self, batch: int) -> int:
        return batch - 2


class Backwards(Ahead):
    def admit(self, batch: int) -> int:
        return batch - batch % 2 if batch < 5 else 3


def test_the_conformance_test_finds_what_is_wrong():
    class Hasty(rft.FullyAsynchronous):
        """Promises less than it does: as if it had the bound of another."""

        @property
        def max_staleness(self) -> int:
            return 1

    class Rushed(rft.MultiExplorerAsynchronous):
        """Has more explorers load at a time than it says."""

        def loads_at_once(self, explorers: int) -> int:
            return 2 * super().loads_at_once(explorers)

    with pytest.raises(ScheduleError, match=r"Rushed: loads while \[\d\] do"):
        check_strategy(Rushed(), runs=50)
    check_strategy(rft.FullyAsynchronous(max_staleness=1), runs=50)
    with pytest.raises(ConfigurationError, match="staleness of 2"):
        check_strategy(Hasty(max_staleness=2), runs=50)

    again = drive(rft.FullyAsynchronous(max_staleness=1), batches=4, train_time=3.0, crashes=[Crash(9.0, back=1)])
    check_events(rft.FullyAsynchronous(max_staleness=1), again, batches=4, crashes=[Crash(9.0, back=1)])
    (resume,) = [event for event in again if event.what == "resumed"]
    assert resume.groups  # else the next shows nothing
    for broken in (
        [replace(event, version=event.version + 1) if event is resume else event for event in again],
        [replace(event, groups=(GroupKey(0, 0),)) if event is resume else event for event in again],
        [replace(event, version=0) if event.what == "ready" else event for event in again],
    ):
        with pytest.raises(ScheduleError):
            check_events(rft.FullyAsynchronous(max_staleness=1), broken, batches=4, crashes=[Crash(9.0)])

    events = drive(Synchronous(), batches=3)
    for broken in (
        [event for event in events if event.what != "pushed"],
        [replace(event, version=0) if event.what == "ready" else event for event in events],
        [replace(event, groups=()) if event.what == "training" else event for event in events],
        [event for event in events if event.version != 1],
    ):
        with pytest.raises(ScheduleError):
            check_events(Synchronous(), broken, batches=3)


def check(
    rule: Any,
    events: Sequence[Event],
    batches: int,
    size: Callable[[int], int],
    capacity: int | None,
    most: int | None,
    samples: int,
) -> None:
    """Retells a run from its events alone and holds it to what the strategy promises."""
    every_group = {GroupKey(batch, slot) for batch in range(batches) for slot in range(size(batch))}
    version = pushed = -1
    trained, pushes = count(), [0, *(batch + 1 for batch in range(batches) if rule.pushes_after(batch))]
    if pushes[-1] != batches:
        pushes.append(batches)  # the end of the run
    loaded: dict[int, int] = {}
    alone: set[int] = set()  # who loaded by itself
    running: dict[GroupKey, Event] = {}
    left: dict[GroupKey, int] = {}  # samples that have not ended
    unissued, now = sorted(every_group), 0.0
    ready: dict[GroupKey, int] = {}
    waiting_again: set[GroupKey] = set()
    begun: dict[GroupKey, set[int]] = {}  # the versions that a group was explored with, as tokens may be kept
    undisturbed = not any(event.what == "died" for event in events)

    def load(explorer: int | None) -> int:
        return sum(left[key] for key, work in running.items() if work.explorer == explorer)

    def able(key: GroupKey) -> list[int]:
        """Explorers that could be given a group."""
        floor = max(0, rule.admit(key.batch))
        return [i for i, v in loaded.items() if floor <= pushed and floor <= v and (v <= pushed or i in alone)]

    def outstanding() -> int:
        return sum(key.batch >= max(version, 0) for key in {*running, *ready, *waiting_again})

    def waiting() -> list[GroupKey]:
        """Groups that could be issued as far as training goes."""
        full = capacity is not None and outstanding() >= capacity
        return [*waiting_again, *(key for key in unissued[:1] if not full or key.batch <= max(version, 0))]

    for event in events:
        group, explorer = event.group, event.explorer
        if event.time > now:  # whatever could be done is done
            for key in waiting():
                assert not [i for i in able(key) if most is None or load(i) < most], f"a slot idles, and {key} waits"
            now = event.time
        if event.what == "training":
            continue
        if event.what == "joined":
            assert explorer is not None
            loaded[explorer] = -1
            undisturbed = undisturbed and pushed < 0  # one that comes later may be given newer weights
        elif event.what == "loading":
            assert explorer is not None
            assert loaded[explorer] == -1  # it came late
            alone.add(explorer)
        elif event.what == "loaded":
            assert explorer is not None
            if explorer in alone and loaded[explorer] != -1:
                alone.remove(explorer)  # a push to all
            assert loaded[explorer] <= event.version == max(version, 0)
            assert not any(work.explorer == explorer for work in running.values())  # no swap in mid-group
            loaded[explorer] = event.version
        elif event.what == "died":
            assert explorer is not None
            del loaded[explorer]
            lost = {key for key, work in running.items() if work.explorer == explorer}
            waiting_again |= lost
            running = {key: work for key, work in running.items() if key not in lost}
            for key in lost:
                del left[key]
        elif event.what == "issued":
            assert group is not None
            assert group in every_group  # so it stops in time
            assert group not in ready
            assert group not in running
            assert not waiting_again or group == min(waiting_again)
            waiting_again.discard(group)
            if group in unissued:
                assert group == unissued.pop(0)
            assert max(0, rule.admit(group.batch)) <= event.version == loaded[explorer]  # type: ignore[index]
            assert max(0, rule.admit(group.batch)) <= pushed
            assert load(explorer) == min(load(i) for i in able(group))
            assert most is None or load(explorer) < most
            running[group], left[group] = event, samples
            begun.setdefault(group, set()).add(event.version)
            assert capacity is None or outstanding() <= capacity
        elif event.what == "ended":
            assert group is not None
            assert running[group].explorer == explorer
            left[group] -= 1
            assert left[group] >= 0
        elif event.what in ("ready", "failed"):
            assert group is not None
            assert event.version <= running.pop(group).version
            assert event.version in begun.pop(group)
            assert left.pop(group) == 0
            if event.what == "ready":
                ready[group] = event.version
            else:
                waiting_again.add(group)
        elif event.what == "trained":
            batch = next(trained)
            assert event.version == batch
            assert not running or min(running).batch > batch
            for key in every_group:
                if key.batch == batch:
                    staleness = batch - ready[key]
                    assert 0 <= staleness <= rule.max_staleness
                    if isinstance(rule, Synchronous) and undisturbed:
                        assert ready[key] == batch // rule.sync_interval * rule.sync_interval
            version = batch + 1
        else:
            assert event.what == "pushed"
            assert event.version == pushes.pop(0) == max(version, 0)
            pushed = event.version
            assert all(v in (pushed, -1) for v in loaded.values())  # but for who came while it was pushed
            older = [key for key in {*running, *waiting_again} if rule.admit(key.batch) < pushed]
            assert pushed == 0 or not older
    assert not pushes
    assert version == batches
    assert ready.keys() == every_group
    assert not waiting_again


def test_a_strategy_with_the_old_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Mine\.publishes_after is called pushes_after now"):

        class Mine(rft.SyncStrategy):
            def publishes_after(self, batch: int) -> bool:
                return True

    with pytest.raises(ConfigurationError, match=r"Turns\.staggered is called loading now"):

        class Turns(rft.SyncStrategy):
            staggered = True


def test_by_collective_explorers_load_one_after_another():
    transport = rft.CollectiveTransport()
    assert rft.MultiExplorerAsynchronous(transport=transport).loads_at_once(64) == 1
    assert rft.MultiExplorerAsynchronous().loads_at_once(64) == 16
