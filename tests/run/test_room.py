"""What rank 0 does about samples that have ended: others get their room, unless their group was given up."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest

import lightning_rft as rft
from lightning_rft.errors import ExplorerError
from lightning_rft.experience import GroupKey, Task
from lightning_rft.explorer.messages import Ended, Explore, Loaded, Scored, Several, Started
from lightning_rft.explorer.pool import Died
from lightning_rft.monitor.activity import Activity
from lightning_rft.run.agreement import Agreement
from lightning_rft.run.dispatcher import Dispatcher
from lightning_rft.run.error_rate import ErrorRate
from lightning_rft.run.groups import Groups
from lightning_rft.run.validation import Validation
from lightning_rft.settings import Sampling, Timeouts
from lightning_rft.sync.order import Order
from lightning_rft.sync.schedule import Schedule

FIRST, SECOND, THIRD = (GroupKey(0, slot) for slot in range(3))


class Pool(MagicMock):
    """Keeps which groups were sent to whom, with the number of the attempt."""

    restarts = 0

    def send(self, explorer: int, *messages: Any) -> None:
        for message in messages:
            for one in message.messages if isinstance(message, Several) else [message]:
                if isinstance(one, Explore):
                    self.asked.append((explorer, one.key, one.attempt))


@pytest.fixture
def run() -> tuple[Dispatcher, Pool]:
    """Two explorers with room for one group of four samples each, and what they were sent."""
    pool = Pool(asked=[])
    groups = Groups(
        MagicMock(),
        MagicMock(),
        rft.Buffer(),
        incarnation=7,
        samples_per_task=4,
        min_samples=1,
        sampling=Sampling(8, 1.0),
        max_staleness=0,
    )
    dispatcher = Dispatcher(
        Schedule(Order(rft.Synchronous(), size=lambda batch: 3), samples=4),
        groups,
        pool,
        ErrorRate(0.1, 100),
        Activity(()),
        Agreement(None, lambda: "float32"),
        timeouts=Timeouts(progress_s=60.0),
        check_interrupt=lambda: None,
        load_label="load",
    )
    for explorer in (0, 1):
        dispatcher.handle(explorer, Started("float32", 1, False, max_num_seqs=4))
        dispatcher.roster.begin_load(explorer, now=0)
        dispatcher.handle(explorer, Loaded(0))
        dispatcher.handle(explorer, Scored(0))
    dispatcher.tell(dispatcher.schedule.pushed, 0)
    assert pool.asked == [(0, FIRST, 1), (1, SECOND, 1)]
    return dispatcher, pool


def test_a_sample_that_has_ended_makes_room_for_the_next_group(run: tuple[Dispatcher, Pool]) -> None:
    dispatcher, pool = run
    dispatcher.handle(1, Ended(7, {(SECOND, 1): 1}))
    assert pool.asked[2:] == [(1, THIRD, 1)]
    assert dispatcher.roster.owed(1) == "7 samples of 2 groups"


def test_samples_of_another_run_of_validation_or_of_what_was_given_up_make_none(run: tuple[Dispatcher, Pool]) -> None:
    dispatcher, pool = run
    dispatcher.handle(0, Ended(6, {(FIRST, 1): 4}))
    assert pool.asked[2:] == []
    dispatcher.tell(dispatcher.schedule.failed, FIRST)
    assert pool.asked[2:] == [(0, FIRST, 2)]
    dispatcher.handle(0, Ended(7, {(FIRST, 1): 4}))  # of the attempt before
    assert pool.asked[3:] == []
    dispatcher.ask(Validation([Task("?"), Task("!")], run=7, samples=2, sampling=Sampling(8, 0.0)))
    assert [explorer for explorer, key, _ in pool.asked[3:] if Validation.owns(key)] == [0, 1]
    question = pool.asked.pop()[1]
    pool.asked.pop()
    dispatcher.handle(1, Ended(7, {(question, 0): 2}))
    assert pool.asked[4:] == []
    assert dispatcher.roster.owed(1) == "4 samples of 2 groups"


def test_a_dead_explorers_samples_run_anew(run: tuple[Dispatcher, Pool]) -> None:
    dispatcher, pool = run
    dispatcher.handle(0, Ended(7, {(FIRST, 1): 1}))
    assert pool.asked[2:] == [(0, THIRD, 1)]
    dispatcher.handle(0, Died(ExplorerError("gone")))
    assert pool.asked[3:] == []
    dispatcher.handle(1, Ended(7, {(SECOND, 1): 1}))
    assert pool.asked[3:] == [(1, FIRST, 2)]
    dispatcher.handle(1, Ended(7, {(SECOND, 1): 3}))
    assert pool.asked[4:] == []  # all four of it run
