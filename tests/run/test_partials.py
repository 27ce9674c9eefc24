"""What rank 0 does with the tokens of samples that are still explored."""

from __future__ import annotations

import pytest

import lightning_rft as rft
from lightning_rft.errors import ExplorerError
from lightning_rft.experience import Experience, GroupKey, Turn
from lightning_rft.explorer.messages import Died, Explored, Sampled, Started
from lightning_rft.explorer.partials import Part
from lightning_rft.run.partials import Partials
from tests.run.dispatched import RUN, load, started

FIRST = GroupKey(0, 0)


def part(versions: list[int], start: int = 0, sample: int = 0, call: bytes = b"call", reason: str = "") -> Part:
    ids = range(start, start + len(versions))
    return Part(sample, call, start, Turn((), ids, [-0.5] * len(versions), versions, reason))


def sampled(*parts: Part, key: GroupKey = FIRST, attempt: int = 1) -> Sampled:
    return Sampled(RUN, key, attempt, parts)


def ids(partials: Partials, key: GroupKey = FIRST) -> list[list[int]]:
    return [one.tokens.token_ids.tolist() for one in partials.of(key)]


def test_parts_are_joined_by_call() -> None:
    partials = Partials()
    partials.take(sampled(part([0, 0]), part([0], sample=1)))
    partials.take(sampled(part([1, 2], start=2), part([2, 2], sample=1, call=b"other", reason="stop")))
    whole, *others = partials.of(FIRST)
    assert whole.tokens.token_ids.tolist() == [0, 1, 2, 3] and whole.tokens.versions.tolist() == [0, 0, 1, 2]
    assert [(one.sample, one.call, one.start, one.tokens.finish_reason) for one in (whole, *others)] == [
        (0, b"call", 0, ""),
        (1, b"call", 0, ""),
        (1, b"other", 0, "stop"),
    ]
    partials.take(sampled(part([3])))  # from the start again
    assert ids(partials)[0] == [0]
    partials.forget(FIRST)
    assert FIRST not in partials and partials.of(FIRST) == ()


def test_what_began_with_weights_that_are_too_old_is_dropped() -> None:
    partials = Partials()
    partials.take(sampled(part([2, 5]), part([3], sample=1), part([5, 5], sample=2)))
    partials.drop_older(FIRST, 2)
    assert len(partials.of(FIRST)) == 3
    partials.drop_older(FIRST, 3)
    assert [one.sample for one in partials.of(FIRST)] == [1, 2]
    partials.drop_older(FIRST, 6)
    assert FIRST not in partials
    partials.drop_older(GroupKey(8, 0), 1)


def test_the_next_explorer_is_given_what_the_dead_one_had_sampled() -> None:
    dispatcher, pool = started(rft.Synchronous())
    assert [(explorer, one.key, one.kept) for explorer, one in pool.asked] == [(0, FIRST, ())]
    dispatcher.handle(0, sampled(part([0, 0])))
    dispatcher.handle(0, sampled(part([0], start=2)))
    dispatcher.handle(0, sampled(part([0] * 5), attempt=0))  # of something that was given up
    dispatcher.handle(0, Sampled(RUN - 1, FIRST, 1, (part([0] * 5),)))  # of another run
    dispatcher.handle(0, Died(ExplorerError("gone")))
    explorer, again = pool.asked[1]
    assert (explorer, again.key, again.attempt) == (1, FIRST, 2)
    (kept,) = again.kept
    assert kept.tokens.token_ids.tolist() == [0, 1, 2]
    turn = Turn((1,), (2, 3), (-0.5, -0.5), (0, 0), "stop")
    dispatcher.handle(1, Explored(RUN, FIRST, 2, "t", (Experience("t", 0, (turn,), 1.0),)))
    assert FIRST not in dispatcher.groups.partials


@pytest.mark.parametrize("end", ["dropped", "two deaths"])
def test_a_group_that_is_given_up_leaves_nothing(end: str) -> None:
    dispatcher, pool = started(rft.Synchronous())
    dispatcher.handle(0, sampled(part([0, 0])))
    if end == "dropped":
        dispatcher.groups.drop(FIRST)
        assert FIRST not in dispatcher.groups.partials
        return
    dispatcher.handle(0, Died(ExplorerError("gone")))
    dispatcher.handle(1, sampled(part([0, 0, 0]), attempt=2))
    dispatcher.handle(2, Started("float32", 1, False, max_num_seqs=4))
    load(dispatcher, 2, 0)
    dispatcher.handle(1, Died(ExplorerError("gone")))
    assert [(explorer, one.attempt, len(one.kept)) for explorer, one in pool.asked] == [(0, 1, 0), (1, 2, 1), (2, 3, 0)]


def test_old_tokens_stay_within_the_bound_of_an_asynchronous_strategy() -> None:
    """With them, a group is as old as when it was first explored, though its explorer has newer weights."""
    strategy = rft.FullyAsynchronous(max_staleness=1)
    dispatcher, pool = started(strategy, explorers=1)
    schedule = dispatcher.schedule
    assert [one.key for _, one in pool.asked] == [FIRST, GroupKey(1, 0)]
    dispatcher.handle(0, sampled(part([0, 0]), key=GroupKey(1, 0)))
    schedule.ready(FIRST, 0)
    schedule.wanted(0)
    schedule.trained(0)
    dispatcher.tell(schedule.pushed, 1)
    dispatcher.handle(1, Started("float32", 1, False, max_num_seqs=4))
    load(dispatcher, 1, 1)
    dispatcher.handle(0, Died(ExplorerError("gone")))
    explorer, again = next((index, one) for index, one in pool.asked if one.attempt == 2)
    assert (explorer, again.key, len(again.kept)) == (1, GroupKey(1, 0), 1)
    assert schedule.order._running[GroupKey(1, 0)] == 0
