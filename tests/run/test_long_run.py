"""Nothing that rank 0 holds grows with the number of steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import lightning_rft as rft
from tests.run.rank_zero import PERIOD, RankZero

STRATEGIES: dict[str, Callable[[], rft.SyncStrategy]] = {
    "in order": lambda: rft.OneStepOffPolicy(2),
    "by age": lambda: rft.MultiExplorerAsynchronous(max_staleness=3),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_after_2000_steps_as_much_is_held_as_after_200(strategy: str) -> None:
    with RankZero(STRATEGIES[strategy](), ":memory:", explorers=3, groups=1, keep=10) as run:
        held = []
        for period in range(50):
            for _ in range(PERIOD):
                run.step()
            run.settle()
            if period in (4, 49):
                held.append(run.sizes())
        early, late = held
    assert early["table groups"] > 10 and early[".roster._records"] == 3 and len(early) > 20  # it sees what is there
    assert late == early


def test_explorers_whose_turn_it_is_are_told_together() -> None:
    with RankZero(rft.MultiExplorerAsynchronous(max_staleness=3), ":memory:", explorers=9) as run:
        for _ in range(12):  # nobody has died yet
            run.step()
            assert run.loads == [(0, 1), (2, 3), (4, 5), (6, 7), (8,)]
