"""Turns on shared GPUs, event by event."""

from __future__ import annotations

import pytest

from lightning_rft.errors import ScheduleError
from lightning_rft.explorer.messages import Sleep, Slept, Wake, Woken
from lightning_rft.explorer.restarts import Restarts
from lightning_rft.explorer.turns import Turns


def asleep(count: int) -> Turns:
    turns = Turns()
    for explorer in range(count):
        assert turns.joined(explorer) == []
    assert turns.trainer(2) == [(explorer, Sleep(2)) for explorer in range(count)]
    for explorer in range(count):
        assert not turns.asleep(range(count))
        turns.answered(explorer, Slept())
    assert turns.asleep(range(count))
    return turns


def test_one_that_comes_up_in_the_trainers_turn_is_told_to_sleep() -> None:
    turns = asleep(1)
    assert not turns.asleep([0, 1])  # it is up, though it has not been heard of
    assert turns.joined(1) == [(1, Sleep(2))]
    assert not turns.asleep([0, 1]) and turns.late == [1]
    turns.answered(1, Slept())
    assert turns.asleep([0, 1])


def test_weights_wake_first_and_a_load_wakes_the_rest() -> None:
    turns = asleep(2)
    assert turns.explorers(("weights",)) == [(0, Wake(("weights",))), (1, Wake(("weights",)))]
    turns.answered(0, Woken(("weights",)))
    turns.died(1)
    assert turns.late == []
    turns.loaded(0)
    assert turns.explorers() == [] and not turns.asleep([0])


def test_what_is_awake_stays_so() -> None:
    turns = asleep(1)
    turns.explorers(("weights",))
    turns.answered(0, Woken(("weights",)))
    assert turns.explorers() == [(0, Wake(("kv_cache",)))]
    turns.answered(0, Woken(("kv_cache",)))
    assert turns.trainer(1) == [(0, Sleep(1))]


def test_hands_do_not_change_before_all_have_answered() -> None:
    turns = Turns()
    turns.joined(0)
    turns.trainer(1)
    for change in (turns.explorers, lambda: turns.trainer(1)):
        with pytest.raises(ScheduleError, match=r"explorers \[0\] have yet to sleep or wake"):
            change()
    turns.answered(7, Slept())  # of one that is gone
    assert turns.late == [0]


def test_starts_wait_while_they_are_held() -> None:
    restarts = Restarts(maximum=3, window_s=600)
    restarts.died(slot=0, now=0)
    restarts.held = True
    assert restarts.due(now=9) == [] and restarts.vacant == 1
    restarts.held = False
    assert restarts.due(now=9) == [0] and restarts.vacant == 0
