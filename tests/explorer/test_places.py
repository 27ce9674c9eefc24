"""Places that nobody takes: for how long, and what a run can do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_rft.errors import DeadlineError
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.launcher import Launcher, Place
from lightning_rft.explorer.messages import Started
from lightning_rft.explorer.places import Places
from lightning_rft.explorer.restarts import Restarts

UP = Started("float32", 1, False, 64)
LIMIT = "Timeouts(start_s=10)"


class Doorman(Launcher):
    """Has as many explorers as have come."""

    waiting = 0

    def launch(self, place: Place) -> Any:
        if not self.waiting:
            return None
        self.waiting -= 1
        return f"process at {place.slot}"

    @property
    def missing(self) -> str:
        return "send more"


@pytest.fixture
def doorman() -> Doorman:
    return Doorman()


@pytest.fixture
def places(doorman: Doorman) -> Places:
    places = Places(doorman, Restarts(maximum=5, window_s=600))
    places.open(Path(), [Place(slot, FakeEngine(), None, None, Path()) for slot in range(2)])
    return places


def test_a_run_begins_when_all_have_come(doorman: Doorman, places: Places) -> None:
    doorman.waiting = 1
    assert list(places.fill(now=0)) == [(0, "process at 0")]
    places.came_up[0] = UP
    places.check(1e9, LIMIT)  # nobody has said yet for how long
    places.begin(patience_s=10, now=100)
    assert places.needed == 2
    places.check(110, LIMIT)
    with pytest.raises(DeadlineError, match=r"have taken 1 of 2 places within Timeouts\(start_s=10\): send more"):
        places.check(111, LIMIT)
    doorman.waiting = 5
    assert list(places.fill(now=111)) == [(1, "process at 1")]
    assert doorman.waiting == 4
    places.check(1e9, LIMIT)


def test_it_goes_on_while_one_is_left_and_for_a_while_without_any(doorman: Doorman, places: Places) -> None:
    doorman.waiting = 2
    assert len(list(places.fill(now=0))) == 2
    places.begin(patience_s=10, now=0)
    places.came_up |= {0: UP, 1: UP}
    assert places.died(1, now=50)
    assert places.needed == 2  # another may be there at once
    assert list(places.fill(now=51)) == []
    assert places.needed == 1
    places.check(1e9, LIMIT)
    assert places.died(0, now=200)
    assert places.needed == 1
    places.check(205, LIMIT)  # not yet asked for
    assert list(places.fill(now=201)) == []
    assert places.needed == 1
    places.check(211, LIMIT)
    with pytest.raises(DeadlineError, match="have taken 0 of 2 places"):
        places.check(212, LIMIT)
    doorman.waiting = 1
    assert list(places.fill(now=212)) in ([(1, "process at 1")], [(0, "process at 0")])
    places.check(1e9, LIMIT)


def test_one_that_never_came_up_is_waited_for_anew(doorman: Doorman, places: Places) -> None:
    doorman.waiting = 2
    list(places.fill(now=0))
    places.begin(patience_s=10, now=0)
    places.came_up[0] = UP
    assert places.died(1, now=5)
    assert list(places.fill(now=6)) == []
    assert places.needed == 2
    places.check(16, LIMIT)
    with pytest.raises(DeadlineError, match="have taken 1 of 2 places"):
        places.check(17, LIMIT)


def test_closed_places_are_forgotten(doorman: Doorman, places: Places) -> None:
    places.begin(patience_s=1, now=0)
    places.close()
    places.check(1e9, LIMIT)
    assert list(places.fill(now=0)) == []
