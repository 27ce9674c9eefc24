"""A push whose members die, hang or stay: who is heard, and that no one is waited for in vain."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lightning_rft.errors import ExplorerError, LinkError, TransportError
from lightning_rft.sync.transports import collective
from lightning_rft.sync.transports.transport import Sender, Weights


class Explorers:
    """Two are alive and nothing failed, until they have been asked so often."""

    def __init__(self, fails_after: int | None = None, dies_after: int | None = None) -> None:
        self._fails_after = fails_after
        self._dies_after = dies_after
        self._asked = 0

    def raise_failures(self) -> None:
        self._asked += 1
        if self._fails_after is not None and self._asked > self._fails_after:
            raise ExplorerError("its own words")

    def members(self) -> dict[int, int]:
        return {0: 1} if self._dies_after is not None and self._asked > self._dies_after else {0: 1, 1: 1}


class Alive(Explorers):
    """They go on with the next push; but the second has not loaded when a push has passed its deadline."""

    dtype = "float32"

    def __init__(self, stuck: bool = False) -> None:
        super().__init__()
        self.ended: dict[int, str] = {}
        self._stuck = stuck

    def members(self) -> dict[int, int]:
        return {explorer: 1 for explorer in (0, 1) if explorer not in self.ended}

    def load(self, *_: object) -> None:
        pass

    def wait_loaded(self, version: int, explorers: list[int], timeout_s: float) -> list[int]:
        late = [explorer for explorer in explorers if explorer == 1]
        if late:
            time.sleep(timeout_s + 0.001)
        return late

    def settle(self, explorers: list[int], timeout_s: float) -> list[int]:
        assert explorers == [0, 1]
        return [1] if self._stuck else []

    def end(self, explorers: list[int], blame: str) -> None:
        self.ended |= dict.fromkeys(explorers, blame)


class Sends(Sender):
    """Whatever it sends goes into some buffer."""

    sent = 0

    def send(self, tensors: object, manifest: object) -> None:
        self.sent += 1


def watched(function: object, explorers: Explorers, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    collective._watched(function, {0: 1, 1: 1}, explorers, deadline, [])  # type: ignore[arg-type]


def raising(error: Exception) -> object:
    def function() -> None:
        raise error

    return function


def test_a_push_that_works() -> None:
    done: list[int] = []
    watched(lambda: done.append(1), Explorers())
    assert done == [1]


def test_a_connection_that_breaks_can_be_tried_again_and_an_error_of_ours_not() -> None:
    with pytest.raises(LinkError, match="connection closed by peer"):
        watched(raising(RuntimeError("connection closed by peer")), Explorers())
    with pytest.raises(TransportError, match="wrong shape") as caught:
        watched(raising(TransportError("wrong shape")), Explorers())
    assert not isinstance(caught.value, LinkError)


def test_a_push_that_hangs_ends_with_a_member_or_the_run_or_its_deadline() -> None:
    end = threading.Event()
    try:
        with pytest.raises(LinkError, match=r"explorers \[1\] are gone"):
            watched(end.wait, Explorers(dies_after=3))
        with pytest.raises(ExplorerError, match="its own words"):
            watched(end.wait, Explorers(fails_after=3))
        with pytest.raises(LinkError, match=r"raise CollectiveTransport\(timeout_s=...\)"):
            watched(end.wait, Explorers(), timeout_s=0.1)
    finally:
        end.set()


@pytest.mark.parametrize("stuck", [False, True])
def test_a_push_that_is_late_though_all_is_sent(stuck: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights fit the buffers of a network, where none may be at the other end."""
    senders: list[Sends] = []
    transport = collective.CollectiveTransport(timeout_s=0.1)
    monkeypatch.setattr(transport, "_make_sender", lambda *_: senders.append(Sends()) or senders[-1])
    weights, to = Weights.of([("weight", torch.ones(2))], "float32"), Alive(stuck)
    if stuck:
        transport.push(weights, 3, to)  # type: ignore[arg-type]
        blame = "did not load version 3 in time: raise CollectiveTransport(timeout_s=...), or see its log"
        assert to.ended == {1: blame}
    else:
        with pytest.raises(LinkError, match=r"passed its deadline: raise CollectiveTransport\(timeout_s=...\)"):
            transport.push(weights, 3, to)  # type: ignore[arg-type]
        assert to.ended == {}
    assert [sender.sent for sender in senders] == ([1, 1] if stuck else [1])


def test_a_push_that_breaks_off_again_and_again_without_a_death_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Sender):
        sent = 0

        def send(self, tensors: object, manifest: object) -> None:
            Broken.sent += 1
            raise RuntimeError("no route")

    transport = collective.CollectiveTransport()
    monkeypatch.setattr(transport, "_make_sender", lambda *_: Broken())
    with pytest.raises(TransportError, match=r"broke off 3 times: .*no route"):
        transport.push(Weights.of([("weight", torch.ones(2))], "float32"), 0, Alive())  # type: ignore[arg-type]
    assert Broken.sent == 3


def test_what_a_push_left_behind_has_ended_when_the_transport_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs(Sender):
        def send(self, tensors: object, manifest: object) -> None:
            threads.append(threading.current_thread())
            end.wait()

    threads: list[threading.Thread] = []
    end = threading.Event()
    transport = collective.CollectiveTransport(timeout_s=0.2)
    monkeypatch.setattr(transport, "_make_sender", lambda *_: Hangs())
    with pytest.raises(LinkError, match="passed its deadline"):
        transport.push(Weights.of([("weight", torch.ones(2))], "float32"), 0, Alive())  # type: ignore[arg-type]
    assert [thread.is_alive() for thread in threads] == [True]
    threading.Timer(0.2, end.set).start()  # as an operation of its own deadline ends
    transport.close()
    assert [thread.is_alive() for thread in threads] == [False]
