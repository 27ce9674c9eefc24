"""Scores, and what is trained once more."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rft.buffer.selection import Priority, Replay, ReplayMemory, recency, reward_variance
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey, Turn


def make_group(batch: int, slot: int = 0, version: int = 0, rewards: tuple[float, ...] = (0.0,)) -> Group:
    turn = Turn((1,), (2, 3), (-0.5, -0.5), (version, version + 1), "stop")  # swapped in mid-generation
    experiences = tuple(Experience("task", index, (turn,), reward) for index, reward in enumerate(rewards))
    return Group(GroupKey(batch, slot), "task", experiences)


def test_scores() -> None:
    group = make_group(0, version=3, rewards=(0.0, 0.0, 1.0, 1.0))
    assert Priority("reward_variance")(group) == reward_variance(group) == 0.25
    assert Priority("recency")(group) == recency(group) == 3.0
    assert Priority(lambda group: len(group.experiences))(group) == 4.0
    assert reward_variance(make_group(0, rewards=(0.7, 0.7, 0.7))) == 0.0


def odd_score(group: Group) -> Any:
    return {0: float("nan"), 1: float("inf"), 2: None, 3: "high"}[group.key.batch]


@pytest.mark.parametrize("batch", range(4))
def test_a_score_is_a_finite_number(batch: int) -> None:
    with pytest.raises(ConfigurationError, match=r"Priority\(score=odd_score\) returned .* for task 'task': return a"):
        Priority(odd_score)(make_group(batch))


@pytest.mark.parametrize("score", ["variance", 3.0, None])
def test_what_is_no_score(score: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"give 'reward_variance' or 'recency', or a function"):
        Priority(score)


@pytest.mark.parametrize("settings", [{"times": 1}, {"groups": 0}])
def test_replays_that_cannot_be(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="must be at least"):
        Replay(**settings)


def keys(groups: list[Group]) -> list[tuple[int, int]]:
    return [tuple(group.key) for group in groups]  # type: ignore[misc]


def test_the_newest_come_along_until_they_are_too_old_or_used_up() -> None:
    memory = ReplayMemory(Replay(times=3, groups=2), tasks_per_step=2, max_staleness=2)
    assert memory.chosen(0) == []
    memory.trained(0, [make_group(0, 1), make_group(0, 0)])
    assert memory.replayed == 0
    assert keys(memory.chosen(1)) == keys(memory.chosen(1)) == [(0, 0), (0, 1)]
    memory.trained(1, [make_group(1, 0, version=1), make_group(1, 1)])
    assert memory.replayed == 2
    assert keys(memory.chosen(2)) == [(1, 0), (0, 0)]  # of version 1, then by key
    memory.trained(2, [make_group(2, 0, version=2), make_group(2, 1, version=2)])
    assert keys(memory.chosen(3)) == [(2, 0), (2, 1)]
    memory.trained(3, [])
    memory.trained(4, [])
    assert keys(memory.chosen(5)) == []  # these were trained three times, and the others are too old


@pytest.mark.parametrize(("tasks_per_step", "expected"), [(1, 1), (3, 1), (8, 4)])
def test_half_a_batch_comes_along_unless_told_otherwise(tasks_per_step: int, expected: int) -> None:
    memory = ReplayMemory(Replay(), tasks_per_step, max_staleness=1)
    memory.trained(0, [make_group(0, slot) for slot in range(tasks_per_step)])
    assert len(memory.chosen(1)) == expected


def test_without_replay_nothing_comes_along_and_nothing_is_kept() -> None:
    memory = ReplayMemory(None, tasks_per_step=4, max_staleness=5)
    memory.trained(0, [make_group(0)])
    assert memory.chosen(1) == []
    assert not memory._trainings


@given(
    times=st.integers(2, 4),
    groups=st.none() | st.integers(1, 3),
    bound=st.integers(0, 4),
    lags=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=12),
)
def test_every_promise_of_replay(times: int, groups: int | None, bound: int, lags: list[list[int]]) -> None:
    memory = ReplayMemory(Replay(times, groups), tasks_per_step=3, max_staleness=bound)
    trainings: Counter[GroupKey] = Counter()
    versions: dict[GroupKey, int] = {}
    for batch, batch_lags in enumerate(lags):
        fresh = [make_group(batch, slot, max(0, batch - min(lag, bound))) for slot, lag in enumerate(batch_lags)]
        along = memory.chosen(batch)
        able = {key for key, count in trainings.items() if count < times and batch - versions[key] <= bound}
        best = sorted(able, key=lambda key: (-versions[key], key))[: groups or 1]
        assert [group.key for group in along] == best
        memory.trained(batch, fresh)
        assert memory.replayed == len(along)
        versions |= {group.key: group.oldest_version for group in fresh}
        trainings.update(group.key for group in [*fresh, *along])
        kept = {key for key, count in trainings.items() if count < times and batch + 1 - versions[key] <= bound}
        assert memory._trainings.keys() == kept  # no more memory than is of use
