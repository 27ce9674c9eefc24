"""Who is overdue."""

from __future__ import annotations

from lightning_rft.explorer.watch import Watch


def test_who_owes_nothing_may_be_silent_for_ever() -> None:
    watch = Watch(timeout_s=10)
    watch.advanced(0, now=0)
    assert watch.overdue(now=1000) == []
    watch.asked(0, now=1000)
    assert watch.overdue(now=1009) == []
    watch.answered(0, now=1009)
    assert watch.overdue(now=5000) == []


def test_answers_and_progress_count_but_more_work_does_not() -> None:
    watch = Watch(timeout_s=10)
    for now in (0, 4, 8):
        watch.asked(0, now=now)
    assert watch.overdue(now=11) == [0]
    watch.answered(0, now=11)
    assert watch.overdue(now=20) == []
    watch.advanced(0, now=20)
    assert watch.overdue(now=29) == []
    assert watch.overdue(now=31) == [0]


def test_the_dead_are_not_waited_for() -> None:
    watch = Watch(timeout_s=10)
    watch.asked(0, now=0)
    watch.asked(1, now=0)
    watch.gone(0)
    watch.answered(0, now=5)  # what it sent before it died
    assert watch.overdue(now=11) == [1]
