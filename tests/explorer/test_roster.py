"""The roster: what explorers owe, and which of them are overdue."""

from __future__ import annotations

from lightning_rft.experience import GroupKey
from lightning_rft.explorer.messages import Started
from lightning_rft.explorer.roster import Roster

KEYS = [GroupKey(0, slot) for slot in range(3)]


def make_roster(explorers: int = 1) -> Roster:
    roster = Roster(timeout_s=10)
    for explorer in range(explorers):
        roster.started(explorer, Started("float32", world_size=1 + explorer, nccl=False, max_num_seqs=8))
    return roster


def test_an_explorer_that_owes_nothing_may_be_silent_for_ever() -> None:
    roster = make_roster()
    roster.advanced(0, now=0)
    assert roster.overdue(now=1000) == []
    roster.asked(0, KEYS[0], 8, now=1000)
    assert roster.overdue(now=1009) == []
    assert roster.answered(0, KEYS[0], now=1009) == 1000
    assert roster.overdue(now=5000) == []


def test_answers_and_progress_count_but_more_work_does_not() -> None:
    roster = make_roster()
    for key, now in zip(KEYS, (0, 4, 8), strict=True):
        roster.asked(0, key, 8, now=now)
    assert roster.overdue(now=11) == [0]
    roster.answered(0, KEYS[0], now=11)
    assert roster.overdue(now=20) == []
    roster.advanced(0, now=20)
    assert roster.overdue(now=29) == []
    assert roster.overdue(now=31) == [0]


def test_the_dead_are_not_waited_for() -> None:
    roster = make_roster(2)
    roster.asked(0, KEYS[0], 8, now=0)
    roster.asked(1, KEYS[1], 8, now=0)
    record = roster.died(0)
    assert record is not None and set(record.work) == {KEYS[0]}
    assert roster.died(0) is None
    roster.advanced(0, now=5)  # what it sent before it died
    assert roster.overdue(now=11) == [1]
    assert roster.members == {1: 2}


def test_what_is_owed_is_counted_in_samples() -> None:
    roster = make_roster()
    for key in KEYS:
        roster.asked(0, key, 8, now=0)
    roster.ended(0, KEYS[0], 3)
    roster.answered(0, KEYS[1], now=1)
    assert roster.owed(0) == "13 samples of 2 groups"
    roster.begin_load(0, now=2)
    assert roster.owed(0) == "13 samples of 2 groups, a load"


def test_a_load_is_owed_and_ends_by_success_or_not() -> None:
    roster = make_roster(2)
    roster.begin_load(0, now=0)
    assert roster.is_loading(0) and roster.with_weights == []
    assert roster.overdue(now=11) == [0]
    assert roster.loaded(0, 3, now=11) == (0, False)
    assert roster.with_weights == [0]
    roster.scored(0, now=12)
    assert roster.overdue(now=100) == []
    assert roster.without(3, [0, 1, 7]) == [1]
    roster.begin_load(0, now=20)
    assert roster.with_weights == [], "during a load it computes with nothing"
    roster.load_broke_off(0, now=21)
    assert (roster.broken([0, 1]), roster.is_loading(0), roster.with_weights) == ([0], False, [])
    roster.begin_load(0, now=22)
    assert roster.broken([0]) == []


def test_a_proof_is_owed_after_every_load() -> None:
    roster = make_roster(2)
    for explorer in (0, 1):
        roster.begin_load(explorer, now=0)
        roster.loaded(explorer, 3, now=1)
    roster.scored(0, now=2)
    assert roster.any_unproven and roster.owed(1) == "0 samples of 0 groups, the scores of a text"
    assert roster.overdue(now=12) == [1], "one that hangs while it scores is ended"
    roster.died(1)
    assert not roster.any_unproven


def test_one_that_comes_late_loads_alone_once() -> None:
    roster = make_roster(2)
    roster.want_weights(1)
    assert roster.any_needs_weights
    assert roster.load_alone() == [1]
    assert not roster.any_needs_weights, "it is about to load"
    roster.begin_load(1, now=0)
    assert roster.loaded(1, 0, now=1) == (0, True)
    assert roster.load_alone() == []
    roster.begin_load(1, now=2)
    assert roster.loaded(1, 1, now=3) == (2, False)
