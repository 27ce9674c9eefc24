"""A dispatcher whose explorers are up and have loaded version 0, without processes."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import lightning_rft as rft
from lightning_rft.experience import GroupKey
from lightning_rft.explorer.messages import Explore, Loaded, Scored, Several, Started
from lightning_rft.monitor.activity import Activity
from lightning_rft.run.agreement import Agreement
from lightning_rft.run.dispatcher import Dispatcher
from lightning_rft.run.error_rate import ErrorRate
from lightning_rft.run.groups import Groups
from lightning_rft.settings import Sampling, Timeouts
from lightning_rft.sync.order import Order
from lightning_rft.sync.schedule import Schedule

RUN = 7


class Pool(MagicMock):
    """Keeps what explorers were asked for, each with the explorer."""

    restarts = 0

    def send(self, explorer: int, *messages: Any) -> None:
        for message in messages:
            for one in message.messages if isinstance(message, Several) else [message]:
                if isinstance(one, Explore):
                    self.asked.append((explorer, one))

    @property
    def groups(self) -> list[tuple[int, GroupKey, int]]:
        """The same as explorer, group and number of the attempt."""
        return [(explorer, one.key, one.attempt) for explorer, one in self.asked]


def load(dispatcher: Dispatcher, explorer: int, version: int) -> None:
    """Has an explorer load a version."""
    dispatcher.roster.begin_load(explorer, now=0)
    dispatcher.handle(explorer, Loaded(version))
    dispatcher.handle(explorer, Scored(version))


def started(
    strategy: rft.SyncStrategy, explorers: int = 2, *, tasks_per_step: int = 1, samples: int = 2
) -> tuple[Dispatcher, Pool]:
    """The dispatcher, and what its explorers, with slots for four samples each, were asked for."""
    pool = Pool(asked=[])
    groups = Groups(
        MagicMock(),
        MagicMock(),
        rft.Buffer(),
        incarnation=RUN,
        samples_per_task=samples,
        min_samples=1,
        sampling=Sampling(8, 1.0),
        max_staleness=strategy.max_staleness,
    )
    dispatcher = Dispatcher(
        Schedule(Order(strategy, size=lambda batch: tasks_per_step), samples=samples),
        groups,
        pool,
        ErrorRate(0.1, 100),
        Activity(()),
        Agreement(None, lambda: "float32"),
        timeouts=Timeouts(progress_s=60.0),
        check_interrupt=lambda: None,
        load_label="load",
    )
    for explorer in range(explorers):
        dispatcher.handle(explorer, Started("float32", 1, False, max_num_seqs=4))
        load(dispatcher, explorer, 0)
    dispatcher.tell(dispatcher.schedule.pushed, 0)
    return dispatcher, pool
