"""What rank 0 does about samples that have ended: others get their room, unless their group was given up."""

from __future__ import annotations

import pytest

import lightning_rft as rft
from lightning_rft.errors import ExplorerError
from lightning_rft.experience import GroupKey, Task
from lightning_rft.explorer.messages import Died, Ended
from lightning_rft.run.dispatcher import Dispatcher
from lightning_rft.run.validation import Validation
from lightning_rft.settings import Sampling
from tests.run.dispatched import Pool, started

FIRST, SECOND, THIRD = (GroupKey(0, slot) for slot in range(3))


@pytest.fixture
def run() -> tuple[Dispatcher, Pool]:
    """Two explorers with room for one group of four samples each, and what they were sent."""
    dispatcher, pool = started(rft.Synchronous(), tasks_per_step=3, samples=4)
    assert pool.groups == [(0, FIRST, 1), (1, SECOND, 1)]
    return dispatcher, pool


def test_a_sample_that_has_ended_makes_room_for_the_next_group(run: tuple[Dispatcher, Pool]) -> None:
    dispatcher, pool = run
    dispatcher.handle(1, Ended(7, {(SECOND, 1): 1}))
    assert pool.groups[2:] == [(1, THIRD, 1)]
    assert dispatcher.roster.owed(1) == "7 samples of 2 groups"


def test_samples_of_another_run_of_validation_or_of_what_was_given_up_make_none(run: tuple[Dispatcher, Pool]) -> None:
    dispatcher, pool = run
    dispatcher.handle(0, Ended(6, {(FIRST, 1): 4}))
    assert pool.groups[2:] == []
    dispatcher.tell(dispatcher.schedule.failed, FIRST)
    assert pool.groups[2:] == [(0, FIRST, 2)]
    dispatcher.handle(0, Ended(7, {(FIRST, 1): 4}))  # of the attempt before
    assert pool.groups[3:] == []
    dispatcher.ask(Validation([Task("?"), Task("!")], run=7, samples=2, sampling=Sampling(8, 0.0)))
    assert [explorer for explorer, key, _ in pool.groups[3:] if Validation.owns(key)] == [0, 1]
    question = pool.asked.pop()[1].key
    pool.asked.pop()
    dispatcher.handle(1, Ended(7, {(question, 0): 2}))
    assert pool.groups[4:] == []
    assert dispatcher.roster.owed(1) == "4 samples of 2 groups"


def test_a_dead_explorers_samples_run_anew(run: tuple[Dispatcher, Pool]) -> None:
    dispatcher, pool = run
    dispatcher.handle(0, Ended(7, {(FIRST, 1): 1}))
    assert pool.groups[2:] == [(0, THIRD, 1)]
    dispatcher.handle(0, Died(ExplorerError("gone")))
    assert pool.groups[3:] == []
    dispatcher.handle(1, Ended(7, {(SECOND, 1): 1}))
    assert pool.groups[3:] == [(1, FIRST, 2)]
    dispatcher.handle(1, Ended(7, {(SECOND, 1): 3}))
    assert pool.groups[4:] == []  # all four of it run
