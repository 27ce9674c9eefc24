"""A push whose members die, hang or stay: who is heard, and that no one is waited for in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from lightning_rft.errors import ConfigurationError, ExplorerError, LinkError, TransportError
from lightning_rft.sync.transports import collective
from lightning_rft.sync.transports.gloo import GlooSender
from lightning_rft.sync.transports.ipc import IPCSender
from lightning_rft.sync.transports.nccl import NCCLSender
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
    """Two that load what is pushed, but for one that is ``late``; ``stuck``, it does not even give up."""

    address, dtype, nccl, ipc = "127.0.0.1", "float32", False, False

    def __init__(self, late: int | None = None, stuck: int | None = None) -> None:
        super().__init__()
        self.dead: set[int] = set()
        self.ended: dict[int, str] = {}
        self._late, self._stuck = late, stuck

    def members(self) -> dict[int, int]:
        self._asked += 1
        assert self._asked < 100, "a push that has no end"
        return {explorer: 1 for explorer in (0, 1) if explorer not in self.dead | self.ended.keys()}

    def load(self, *_: object) -> None:
        pass

    def wait_loaded(self, version: int, explorers: list[int], timeout_s: float) -> list[int]:
        late = [explorer for explorer in explorers if explorer == self._late]
        if late:
            time.sleep(min(timeout_s, 1.0) + 0.001)
        return late

    def settle(self, explorers: list[int], timeout_s: float) -> list[int]:
        return [explorer for explorer in explorers if explorer == self._stuck]

    def end(self, explorers: list[int], blame: str) -> None:
        self.ended |= dict.fromkeys(explorers, blame)


class Sends(Sender):
    """Whatever it sends goes into some buffer, but for the first few times, when it breaks off."""

    def __init__(self, breaks_off: int = 0) -> None:
        self.sent = 0
        self.closed = False
        self._breaks_off = breaks_off

    @property
    def joined(self) -> bool:
        return self.sent > 0

    def send(self, tensors: object, manifest: object) -> None:
        assert not self.closed
        if self._breaks_off:
            raise RuntimeError("no route")
        self.sent += 1

    def close(self) -> None:
        self.closed = True


Make = Callable[..., tuple[collective.CollectiveTransport, list[Sends]]]


def push(
    transport: collective.CollectiveTransport, explorers: Alive, version: int = 0, to: list[int] | None = None
) -> None:
    weights = Weights.of([("weight", torch.ones(2))], "float32")
    transport.push(weights, version, explorers, to)  # type: ignore[arg-type]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a transport, the first of whose senders break off, and the list of all that it will have had."""

    def make(timeout_s: float = 30.0, break_off: int = 0) -> tuple[collective.CollectiveTransport, list[Sends]]:
        senders: list[Sends] = []

        def sender(*_: object) -> Sends:
            senders.append(Sends(breaks_off=len(senders) < break_off))
            return senders[-1]

        transport = collective.CollectiveTransport(timeout_s=timeout_s)
        monkeypatch.setattr(transport, "_make_sender", sender)
        return transport, senders

    return make


def watched(function: object, explorers: Explorers, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    transport = collective.CollectiveTransport()
    transport._watched(function, {0: 1, 1: 1}, explorers, deadline)  # type: ignore[arg-type]


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
            watched(partial(end.wait, 20), Explorers(dies_after=3))
        with pytest.raises(ExplorerError, match="its own words"):
            watched(partial(end.wait, 20), Explorers(fails_after=3))
        with pytest.raises(LinkError, match=r"raise CollectiveTransport\(timeout_s=...\)"):
            watched(partial(end.wait, 20), Explorers(), timeout_s=0.1)
    finally:
        end.set()


def test_a_push_that_is_late_though_all_is_sent(make: Make) -> None:
    """Small weights fit the buffers of a network, where none may be at the other end."""
    (transport, senders), to = make(timeout_s=0.1), Alive(late=1)
    with pytest.raises(LinkError, match=r"passed its deadline: raise CollectiveTransport\(timeout_s=...\)"):
        push(transport, to)
    assert to.ended == {}
    assert [sender.sent for sender in senders] == [1]


def test_one_that_is_stuck_in_a_push_that_is_late(make: Make) -> None:
    (transport, senders), to = make(timeout_s=0.1), Alive(late=1, stuck=1)
    push(transport, to, 3)
    blame = "did not load version 3 in time: raise CollectiveTransport(timeout_s=...), or see its log"
    assert to.ended == {1: blame}
    assert [(sender.sent, sender.closed) for sender in senders] == [(1, True), (1, False)]


def test_one_that_is_stuck_in_a_push_that_breaks_off(make: Make) -> None:
    (transport, senders), to = make(break_off=1), Alive(stuck=1)
    push(transport, to)
    assert to.ended == {1: "was stuck in a load that broke off"}
    assert [(sender.sent, sender.closed) for sender in senders] == [(0, True), (1, False)]


def test_who_sends_slowly_hears_that_no_more_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Sender):
        def send(self, tensors: Any, manifest: object) -> None:
            threads.append(threading.current_thread())
            for _ in tensors:
                late.wait(20)

    threads: list[threading.Thread] = []
    late = threading.Event()
    transport = collective.CollectiveTransport(timeout_s=0.2)
    monkeypatch.setattr(transport, "_make_sender", lambda *_: Slow())
    weights = Weights.of([(name, torch.ones(2)) for name in "abc"], "float32")
    with pytest.raises(LinkError, match="passed its deadline"):
        transport.push(weights, 0, Alive())  # type: ignore[arg-type]
    late.set()
    threads[0].join(20)
    assert not threads[0].is_alive()


def test_a_push_that_breaks_off_again_and_again_without_a_death_is_given_up(make: Make) -> None:
    transport, senders = make(break_off=99)
    with pytest.raises(TransportError, match=r"broke off 3 times: .*no route"):
        push(transport, Alive())
    assert [sender.closed for sender in senders] == [True] * 3


def test_groups_are_kept_until_another_has_their_members_or_one_is_dead(make: Make) -> None:
    (transport, senders), to = make(), Alive()

    def groups() -> list[tuple[int, bool]]:
        return [(sender.sent, sender.closed) for sender in senders]

    for version in (0, 1):
        for explorer in (0, 1):
            push(transport, to, version, [explorer])
    assert groups() == [(2, False), (2, False)]
    push(transport, to, 2)
    assert groups() == [(2, True), (2, True), (1, False)]
    push(transport, to, 3, [1])
    assert groups() == [(2, True), (2, True), (1, True), (1, False)]
    to.dead.add(1)
    push(transport, to, 4)
    assert groups()[3:] == [(1, True), (1, False)]
    transport.close()
    assert all(sender.closed for sender in senders)


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("backend", "device", "nccl", "ipc", "chosen"),
    [
        ("auto", GPU, False, True, IPCSender),
        ("auto", GPU, True, False, NCCLSender),
        ("auto", GPU, False, False, GlooSender),
        ("auto", CPU, True, True, GlooSender),
        ("gloo", GPU, True, True, GlooSender),
        ("nccl", GPU, True, False, NCCLSender),
        ("ipc", GPU, False, True, IPCSender),
        ("nccl", GPU, False, True, None),
        ("nccl", CPU, True, False, None),
        ("ipc", GPU, True, False, None),
        ("ipc", CPU, False, True, None),
        ("mpi", CPU, False, True, None),
    ],
)
def test_what_is_chosen(backend: Any, device: torch.device, nccl: bool, ipc: bool, chosen: type[Sender] | None) -> None:
    to = Alive()
    to.nccl, to.ipc = nccl, ipc
    if chosen is not None:
        transport = collective.CollectiveTransport(backend)
        assert type(transport._make_sender(device, to)) is chosen  # type: ignore[arg-type]
    else:
        with pytest.raises(ConfigurationError, match=f"backend='{backend}'"):
            collective.CollectiveTransport(backend)._make_sender(device, to)  # type: ignore[arg-type]


@pytest.mark.parametrize("ends", [True, False])
def test_what_a_push_left_behind_is_waited_for_once_when_the_transport_is_closed(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hangs(Sender):
        def send(self, tensors: object, manifest: object) -> None:
            threads.append(threading.current_thread())
            end.wait(60)

    threads: list[threading.Thread] = []
    end = threading.Event()
    transport = collective.CollectiveTransport(timeout_s=0.2)
    monkeypatch.setattr(transport, "_make_sender", lambda *_: Hangs())
    monkeypatch.setattr(collective, "_SETTLE_S", 30.0 if ends else 0.1)
    with pytest.raises(LinkError, match="passed its deadline"):
        push(transport, Alive())
    assert [thread.is_alive() for thread in threads] == [True]
    if ends:
        threading.Timer(0.2, end.set).start()  # as an operation of its own deadline ends
    transport.close()
    assert [thread.is_alive() for thread in threads] == [not ends]
    monkeypatch.setattr(collective, "_SETTLE_S", 30.0)
    began = time.monotonic()
    transport.close()
    assert time.monotonic() - began < 20
    end.set()
