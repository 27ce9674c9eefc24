"""What is not worth training, and the end of a run in which nothing is."""

from __future__ import annotations

import pytest

from lightning_rft.buffer.selection import Filter, has_signal
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey


def make_group(*rewards: float, task_id: str = "task") -> Group:
    experiences = tuple(Experience(task_id, index, (), reward) for index, reward in enumerate(rewards))
    return Group(GroupKey(0, 0), task_id, experiences)


@pytest.mark.parametrize(
    ("rewards", "expected"), [((1.0, 0.0), True), ((0.5,) * 3, False), ((0.0, 0.0, 1e-9), True), ((1.0,), False)]
)
def test_signal_is_a_difference(rewards: tuple[float, ...], expected: bool) -> None:
    assert has_signal(make_group(*rewards)) is expected


def test_what_is_refused_is_counted_and_bounded() -> None:
    groups = Filter(has_signal, tasks_per_step=2)
    good, bad = make_group(0.0, 1.0), make_group(1.0, 1.0, task_id="easy")
    for _ in range(3):
        assert [groups.refuses(bad) for _ in range(15)] == [True] * 15
        assert not groups.refuses(good)  # which begins the count anew
    assert groups.refused == 45
    for _ in range(15):
        groups.refuses(bad)
    with pytest.raises(ConfigurationError, match=r"group_filter refused 16 groups in a row, .* of task 'easy'"):
        groups.refuses(bad)


def test_no_filter_keeps_everything() -> None:
    groups = Filter(None, tasks_per_step=1)
    assert not any(groups.refuses(make_group()) for _ in range(20))
    assert groups.refused == 0
