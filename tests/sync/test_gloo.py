"""A Gloo group in one process: what the receiver yields is what was sent, however long the engine keeps it."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import ProcessGroupGloo  # type: ignore[attr-defined]

from lightning_rft.errors import LinkError, TransportError
from lightning_rft.sync.transports import gloo
from lightning_rft.sync.transports.collective import CollectiveTransport
from lightning_rft.sync.transports.gloo import GlooLink, GlooReceiver, GlooSender
from lightning_rft.sync.transports.memory import ReusedMemory
from lightning_rft.sync.transports.transport import Named, Weights, announce
from tests.sync.background import begun

BUCKET = 64  # bytes: four tensors of each push in a bucket, and one that is larger


class Explorers:
    """One, which joins when it is asked to."""

    address = "127.0.0.1"

    def __init__(self) -> None:
        self.links: queue.Queue[GlooLink] = queue.Queue()

    def connect(self, explorer: int, link: GlooLink) -> None:
        self.links.put(link)


def policy(version: int) -> dict[str, torch.Tensor]:
    embedding = torch.arange(40.0) + 1000 * version
    layers = {f"layer{index}": torch.full((4,), 100.0 * version + index) for index in range(10)}
    return {"embedding": embedding, **layers, "norm": torch.tensor(version + 0.5), "head": embedding}


def test_the_store_listens_on_loopback_until_the_group_has_met() -> None:
    explorers, sender = Explorers(), GlooSender(timeout_s=20, bucket_bytes=BUCKET)
    joined = begun(sender.join, explorers, {0: 1})
    link = explorers.links.get(timeout=20)
    lines = [line.laddr for line in psutil.Process().net_connections("tcp") if line.status == psutil.CONN_LISTEN]
    assert [line.ip for line in lines if line.port == link.port] == ["127.0.0.1"]
    receiver = link.open(0)
    joined.result(20)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((link.host, link.port), 5)
    receiver.close()
    sender.close()


@pytest.fixture
def group() -> Iterator[tuple[GlooSender, GlooReceiver]]:
    explorers, sender = Explorers(), GlooSender(timeout_s=20, bucket_bytes=BUCKET)
    joined = begun(sender.join, explorers, {0: 1})
    receiver = explorers.links.get(timeout=20).open(0)
    joined.result(20)
    yield sender, receiver
    receiver.close()
    sender.close()


def pushed(group: tuple[GlooSender, GlooReceiver], named: Sequence[Named], dtype: str) -> list[Named]:
    """What arrives, all of it kept until everything is there."""
    sender, receiver = group
    weights = Weights.of(named, dtype)
    done = begun(sender.send, weights.tensors(), weights.manifest)
    arrived = list(receiver.receive(weights.manifest))
    done.result(20)
    return arrived


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_may_keep_what_arrives(group: tuple[GlooSender, GlooReceiver], dtype: str) -> None:
    held = [pushed(group, list(policy(version).items()), dtype) for version in range(3)]
    for version, arrived in enumerate(held):
        expected = policy(version)
        assert [name for name, _ in arrived] == list(expected)
        for name, tensor in arrived:
            assert torch.equal(tensor, expected[name].to(getattr(torch, dtype))), (version, name)


def test_a_push_of_nothing_is_over_at_once(group: tuple[GlooSender, GlooReceiver]) -> None:
    assert pushed(group, [], "float32") == []


def test_what_is_tied_travels_once_and_arrives_under_both_names(
    group: tuple[GlooSender, GlooReceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    travelled: list[int] = []
    whole = gloo._broadcast
    monkeypatch.setattr(gloo, "_broadcast", lambda *args: travelled.append(args[1].numel()) or whole(*args))
    weights = policy(0)
    arrived = dict(pushed(group, list(weights.items()), "float32"))
    assert torch.equal(arrived["head"], weights["head"])
    sizes = [weight.numel() * 4 for name, weight in weights.items() if name != "head"]
    assert sum(travelled) == 2 * sum(-(-size // 16) * 16 for size in sizes)  # both ends are in this process


def test_memory_is_lent_again_when_nothing_refers_to_it() -> None:
    memory = ReusedMemory(least=16)
    places = set()
    for _ in range(20):
        tensor = memory.take(16)
        places.add(tensor.data_ptr())
        view = tensor.view(torch.float32)[2:]
        del tensor
    assert len(places) == 2  # the view of the one before still lives when the next is taken
    assert view.numel() == 2


class Alive:
    """Explorers of whom none dies."""

    def raise_failures(self) -> None:
        pass

    def members(self) -> dict[int, int]:
        return {}


def test_who_waits_for_weights_learns_that_a_push_broke_off(
    group: tuple[GlooSender, GlooReceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = group
    weights = Weights.of(list(policy(0).items()), "float32")
    broadcast, trainers, buckets_sent = gloo._broadcast, id(sender._group), []

    def breaks_off(own: Any, buffer: torch.Tensor) -> Any:
        if id(own) == trainers:
            buckets_sent.append(buffer)
            if len(buckets_sent) == 2:
                raise RuntimeError("connection closed by another member")
        return broadcast(own, buffer)

    monkeypatch.setattr(gloo, "_broadcast", breaks_off)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(list, receiver.receive(weights.manifest))
        try:
            watched = CollectiveTransport()._watched
            send = partial(sender.send, weights.tensors(), weights.manifest)
            watched(send, {}, Alive(), time.monotonic() + 20)  # type: ignore[arg-type]
        except LinkError:  # as in a push: while this error is dealt with
            sender.close()
            with pytest.raises(LinkError, match="broke off"):
                waiting.result(5)
        else:
            pytest.fail("the push did not break off")


# Who joins, and when


def test_a_sender_knows_who_is_missing_and_waits_until_it_is_closed() -> None:
    explorers, sender = Explorers(), GlooSender(timeout_s=60, bucket_bytes=BUCKET)
    assert sender.absent() == []
    joined = begun(sender.join, explorers, {4: 1})
    explorers.links.get(timeout=20)
    assert sender.absent() == [4]
    sender.close()
    joined.result(20)
    assert not sender.joined


def test_a_sender_that_is_closed_first_waits_for_nobody() -> None:
    sender = GlooSender(timeout_s=60, bucket_bytes=BUCKET)
    sender.close()
    sender.close()
    begun(sender.join, Explorers(), {0: 1}).result(20)
    assert not sender.joined
    with pytest.raises(AssertionError, match="send before join"):
        sender.send([], [])


def test_a_group_has_met_when_its_members_have_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store has to stay until then."""
    explorers, sender = Explorers(), GlooSender(timeout_s=20, bucket_bytes=BUCKET)
    come, connected, may_tell = GlooLink.come, threading.Event(), threading.Event()

    def tells_late(link: GlooLink, member: int) -> Any:
        tell = come(link, member)

        def later() -> None:
            connected.set()
            assert may_tell.wait(20)
            tell()

        return later

    monkeypatch.setattr(GlooLink, "come", tells_late)
    joined = begun(sender.join, explorers, {0: 1})
    receiver = begun(explorers.links.get(timeout=20).open, 0)
    assert connected.wait(20)
    with pytest.raises(TimeoutError):
        joined.result(0.1)
    assert not sender.joined
    may_tell.set()
    joined.result(20)
    assert sender.joined
    receiver.result(20).close()
    sender.close()


def test_a_group_is_where_rank_0_is_reached_and_has_the_links_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, int, timedelta]] = []
    asked: list[str] = []
    towards = gloo.address_towards

    class Watched(ProcessGroupGloo):  # type: ignore[misc]
        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            seen.append((rank, len(options._devices), options._timeout))
            super().__init__(store, rank, size, options)

    monkeypatch.setattr(gloo, "ProcessGroupGloo", Watched)
    monkeypatch.setattr(gloo, "address_towards", lambda host: asked.append(host) or towards(host))
    explorers, sender = Explorers(), GlooSender(timeout_s=17, bucket_bytes=BUCKET)
    joined = begun(sender.join, explorers, {0: 1})
    receiver = explorers.links.get(timeout=20).open(0)
    joined.result(20)
    assert sorted(seen) == [(rank, 1, timedelta(seconds=17)) for rank in (0, 1)]  # with a device that we chose
    assert asked == ["127.0.0.1"] * 2
    receiver.close()
    sender.close()


def test_a_group_that_cannot_be_made_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(gloo, "_gloo", fails)
    explorers, sender = Explorers(), GlooSender(timeout_s=20, bucket_bytes=BUCKET)
    joined = begun(sender.join, explorers, {0: 1})
    with pytest.raises(LinkError, match="broke off: no such device"):
        explorers.links.get(timeout=20).open(0)
    with pytest.raises(RuntimeError, match="no such device"):
        joined.result(20)
    sender.close()


# What is sent, and what is not


@pytest.mark.parametrize("sent", [["norm"], []], ids=["another", "nothing"])
def test_what_was_announced_must_be_sent(sent: list[str], group: tuple[GlooSender, GlooReceiver]) -> None:
    manifest = announce([("layer", torch.ones(2))], "float32")
    with pytest.raises(TransportError, match=f"layer was announced, but {(sent or ['nothing'])[0]} was to be sent"):
        group[0].send([(name, torch.ones(2)) for name in sent], manifest)


def test_weights_of_a_gpu_are_copied_where_they_are_made() -> None:
    asked: list[Any] = []

    class OnGPU(torch.Tensor):
        def to(self, *place: Any) -> torch.Tensor:
            asked.append(place)
            return self.as_subclass(torch.Tensor)

    weights = Weights([], torch.device("cuda"), lambda: iter([("layer", torch.ones(2).as_subclass(OnGPU))]))
    sender = GlooSender(timeout_s=20, bucket_bytes=BUCKET)
    assert [(name, type(tensor)) for name, tensor in sender.begin(weights)] == [("layer", torch.Tensor)]
    here = replace(weights, device=torch.device("cpu"))
    assert [(name, type(tensor)) for name, tensor in sender.begin(here)] == [("layer", OnGPU)]
    assert asked == [("cpu",)]


@pytest.fixture
def events(group: tuple[GlooSender, GlooReceiver], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The broadcasts that the sender begins and waits for."""
    whole, trainers = gloo._broadcast, id(group[0]._group)
    seen: list[str] = []

    class Travelling:
        def __init__(self, work: Any) -> None:
            self.work, self.number = work, sum("sent" in event for event in seen)
            seen.append(f"sent {self.number}")

        def wait(self) -> None:
            seen.append(f"arrived {self.number}")
            self.work.wait()

    def broadcast(own: Any, buffer: torch.Tensor) -> Any:
        return Travelling(whole(own, buffer)) if id(own) == trainers else whole(own, buffer)

    monkeypatch.setattr(gloo, "_broadcast", broadcast)
    return seen


def three(events: list[str], sender: GlooSender, closed_at: str = "") -> Weights:
    """Weights of a bucket each, whose making is an event; with one of them, the sender is closed."""

    def tensors() -> Iterator[Named]:
        for name in "abc":
            events.append(name)
            if name == closed_at:
                sender.close()
            yield name, torch.ones(BUCKET // 4)

    return Weights(
        announce([(name, torch.ones(BUCKET // 4)) for name in "abc"], "float32"), torch.device("cpu"), tensors
    )


def test_a_bucket_is_packed_while_the_one_before_travels(
    events: list[str], group: tuple[GlooSender, GlooReceiver]
) -> None:
    sender, receiver = group
    weights = three(events, sender)
    arrived = begun(list, receiver.receive(weights.manifest))
    sender.send(weights.tensors(), weights.manifest)
    assert events == ["a", "sent 0", "b", "arrived 0", "sent 1", "c", "arrived 1", "sent 2", "arrived 2"]
    assert [name for name, _ in arrived.result(20)] == ["a", "b", "c"]


def test_a_sender_that_is_closed_in_mid_push_sends_no_more(
    events: list[str], group: tuple[GlooSender, GlooReceiver]
) -> None:
    sender, receiver = group
    weights = three(events, sender, closed_at="b")
    arrived = begun(list, receiver.receive(weights.manifest))
    sender.send(weights.tensors(), weights.manifest)
    assert events == ["a", "sent 0", "b", "arrived 0", "sent 1"]
    with pytest.raises(LinkError, match="broke off"):
        arrived.result(20)


def test_a_receiver_whose_link_breaks_off_as_it_begins_can_be_invited_again(
    group: tuple[GlooSender, GlooReceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(gloo, "_broadcast", fails)
    with pytest.raises(LinkError, match="broke off: connection closed by peer"):
        list(group[1].receive(announce([("layer", torch.ones(2))], "float32")))


def test_a_receiver_that_is_closed_receives_nothing(group: tuple[GlooSender, GlooReceiver]) -> None:
    receiver = group[1]
    receiver.close()
    with pytest.raises(TransportError, match="on a link that was closed") as caught:
        list(receiver.receive([]))
    assert not isinstance(caught.value, LinkError)
