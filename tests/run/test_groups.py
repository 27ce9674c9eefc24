"""What may enter a training step, wherever it comes from and whatever the schedule believes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.errors import ScheduleError
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.run.groups import Groups
from lightning_rft.tasks.plan import TaskCursor, TaskPlan
from lightning_rft.tasks.sources import as_tasks

SIZE = 2


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger.open(":memory:") as ledger:
        ledger.begin()
        yield ledger


def make_group(key: GroupKey, versions: list[int]) -> Group:
    turn = Turn((1, 2), (3,) * len(versions), (-1.0,) * len(versions), versions, "stop")
    return Group(key, str(key.slot), (Experience(str(key.slot), 0, (turn,), 1.0),))


def lease(ledger: Ledger, batch: int, versions: list[int], bound: int) -> Groups:
    """Leases a batch of which one group is wholly on policy and the other as given."""
    cursor = TaskCursor(TaskPlan(as_tasks(["a", "b"]), SIZE, 1, shuffle=False, seed=0))
    groups = Groups(
        ledger,
        cursor,
        rft.Buffer(),
        incarnation=1,
        samples_per_task=1,
        min_samples=1,
        sampling=rft.Sampling(8, 1.0),
        max_staleness=bound,
    )
    keys = [GroupKey(batch, slot) for slot in range(SIZE)]
    groups.issue([(key, 0) for key in keys])
    for key, given in zip(keys, ([batch] * 3, versions), strict=True):
        ledger.ready(make_group(key, given))
    groups.lease(keys, batch)
    return groups


def test_what_is_trained_is_not_expected_any_more(ledger: Ledger) -> None:
    groups = lease(ledger, 0, [0], 0)
    assert groups.expects(GroupKey(0, 1), 1)
    groups.trained(0)
    assert not groups.expects(GroupKey(0, 1), 1)


@pytest.mark.parametrize(("versions", "bound"), [([5, 5, 5], 0), ([4, 5, 5], 1), ([5, 3, 5], 2)])
def test_staleness_within_the_bound_passes(versions: list[int], bound: int, ledger: Ledger) -> None:
    assert len(lease(ledger, 5, versions, bound).with_replay(5)) == SIZE


@pytest.mark.parametrize(
    ("versions", "bound"), [([4, 5, 5], 0), ([5, 5, 6], 3), ([2, 5, 5], 2), ([5, 5, 1], 3), ([-1, -1, -1], 5)]
)
def test_one_token_outside_the_bound_is_refused(versions: list[int], bound: int, ledger: Ledger) -> None:
    with pytest.raises(ScheduleError, match=r"task '1' .* of version 5 with tokens of versions .* 0 to "):
        lease(ledger, 5, versions, bound)
