"""What is not worth training, and the end of a run in which nothing is."""

from __future__ import annotations

import random

import pytest

from lightning_rft.buffer.selection import Filter, has_signal
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey
from lightning_rft.settings import Buffer


def make_group(*rewards: float, task_id: str = "task") -> Group:
    experiences = tuple(Experience(task_id, index, (), reward) for index, reward in enumerate(rewards))
    return Group(GroupKey(0, 0), task_id, experiences)


@pytest.mark.parametrize(
    ("rewards", "expected"), [((1.0, 0.0), True), ((0.5,) * 3, False), ((0.0, 0.0, 1e-9), True), ((1.0,), False)]
)
def test_signal_is_a_difference(rewards: tuple[float, ...], expected: bool) -> None:
    assert has_signal(make_group(*rewards)) is expected


def test_what_is_refused_is_counted_and_bounded_in_samples() -> None:
    groups = Filter(has_signal, max_refused=30)
    good, bad = make_group(0.0, 1.0), make_group(1.0, 1.0, task_id="easy")

    def take(group: Group, times: int = 1) -> None:
        for _ in range(times):
            groups.count(group, groups.keeps(group))

    for _ in range(3):
        take(bad, 15)
        take(good)  # which begins the count anew
        assert groups.share() == 15 / 16
    assert groups.share() == 0  # nothing since
    assert groups.refused == 45
    take(bad, 15)
    with pytest.raises(ConfigurationError, match=r"refused 32 samples in a row.*max_refused=30.* of task 'easy'"):
        take(bad)


def test_a_run_with_few_tasks_that_have_signal_is_healthy() -> None:
    """At 90 % refused, with 4 groups of 8 samples a step, 1,000 steps."""
    chance = random.Random(0)
    groups = Filter(has_signal, Buffer().max_refused)
    for _ in range(40_000):
        group = make_group(0.0, *[float(chance.random() < 0.1)] * 7)
        groups.count(group, groups.keeps(group))
    assert groups.share() == pytest.approx(0.9, abs=0.01)


def test_no_filter_keeps_everything() -> None:
    groups = Filter(None, max_refused=1)
    assert groups.keeps(make_group())
    groups.count(make_group(), kept=True)
    assert groups.refused == 0
