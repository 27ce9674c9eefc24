"""The meeting of a group's members: who has come, who is let in, and who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_rft.errors import LinkError, TransportError
from lightning_rft.sync.transports import meeting as module
from lightning_rft.sync.transports.meeting import Meeting, MeetingPlace, link_errors
from tests.processes import until
from tests.sync.background import begun

LIMIT_S = 20.0


class Invited:
    """A meeting, and the places of the explorers that were invited to it."""

    address = "127.0.0.1"

    def __init__(self, members: dict[int, int]) -> None:
        self.places: dict[int, MeetingPlace] = {}
        self.meeting = Meeting(self.address, members, LIMIT_S)
        self.meeting.invite(self, MeetingPlace)  # type: ignore[arg-type]

    def connect(self, explorer: int, link: MeetingPlace) -> None:
        self.places[explorer] = link


@pytest.fixture
def invited() -> Iterator[Any]:
    made: list[Invited] = []

    def invite(members: dict[int, int]) -> Invited:
        made.append(Invited(members))
        return made[-1]

    yield invite
    for each in made:
        each.meeting.close()


def test_all_are_waited_for_and_then_all_that_connect(invited: Any) -> None:
    of = invited({3: 2, 5: 1})
    assert of.meeting.world_size == 4
    assert {explorer: place.rank for explorer, place in of.places.items()} == {3: 1, 5: 3}
    assert of.meeting.absent() == [3, 5]
    gathered = begun(of.meeting.gather)
    came = [begun(of.places[5].come, 0), begun(of.places[3].come, 1)]
    until(lambda: of.meeting.absent() == [3], "that all but one process come", LIMIT_S)
    with pytest.raises(TimeoutError):
        gathered.result(0.1)
    assert not any(each.done() for each in came)
    came.append(begun(of.places[3].come, 0))
    assert gathered.result(LIMIT_S)
    assert of.meeting.absent() == []
    tells = [each.result(LIMIT_S) for each in came]
    connected = begun(of.meeting.wait_connected)
    for tell in tells[1:]:
        tell()
    with pytest.raises(TimeoutError):
        connected.result(0.1)
    tells[0]()
    connected.result(LIMIT_S)


def test_a_meeting_that_ends_waits_for_nobody(invited: Any) -> None:
    meeting = invited({0: 1}).meeting
    gathered = begun(meeting.gather)
    meeting.close()
    meeting.close()
    assert gathered.result(LIMIT_S) is False
    begun(meeting.wait_connected).result(LIMIT_S)
    assert meeting.absent() == []


def test_who_waits_leaves_the_core_to_others(invited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = invited({0: 1}).meeting
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            meeting.close()

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    assert not begun(meeting.gather).result(LIMIT_S)
    assert slept == [0.001] * 3


def test_one_who_was_invited_to_another_meeting_is_a_stranger(invited: Any) -> None:
    of = invited({0: 1})
    with pytest.raises(LinkError, match="broke off"):
        replace(of.places[0], name="another", timeout_s=0.2).come(0)
    assert of.meeting.absent() == [0]
    assert of.places[0].name not in repr(of.places[0])


@pytest.mark.parametrize("kind", [RuntimeError, OSError])
def test_what_breaks_off_can_be_tried_again_and_an_error_of_ours_stays_what_it_is(kind: type[Exception]) -> None:
    with pytest.raises(LinkError, match="the weight transport broke off: gone"), link_errors():
        raise kind("gone")
    with pytest.raises(TransportError, match=r"^wrong shape$") as caught, link_errors():
        raise TransportError("wrong shape")
    assert not isinstance(caught.value, LinkError)
