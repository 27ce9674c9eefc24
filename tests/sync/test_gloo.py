"""A Gloo group in one process: what the receiver yields is what was sent, however long the engine keeps it."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import psutil
import pytest
import torch

from lightning_rft.errors import LinkError
from lightning_rft.sync.transports import collective, gloo
from lightning_rft.sync.transports.gloo import GlooLink, GlooReceiver, GlooSender
from lightning_rft.sync.transports.memory import ReusedMemory
from lightning_rft.sync.transports.transport import Named, Weights

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
    with ThreadPoolExecutor(1) as threads:
        joined = threads.submit(sender.join, explorers, {0: 1})  # type: ignore[arg-type]
        link = explorers.links.get(timeout=20)
        lines = [line.laddr for line in psutil.Process().net_connections("tcp") if line.status == psutil.CONN_LISTEN]
        assert [line.ip for line in lines if line.port == link.port] == ["127.0.0.1"]
        receiver = link.open(0)
        joined.result()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((link.host, link.port), 5)
    receiver.close()
    sender.close()


@pytest.fixture
def group() -> Iterator[tuple[GlooSender, GlooReceiver]]:
    explorers, sender = Explorers(), GlooSender(timeout_s=20, bucket_bytes=BUCKET)
    with ThreadPoolExecutor(1) as threads:
        joined = threads.submit(sender.join, explorers, {0: 1})  # type: ignore[arg-type]
        receiver = explorers.links.get(timeout=20).open(0)
        joined.result()
    yield sender, receiver
    receiver.close()
    sender.close()


def pushed(group: tuple[GlooSender, GlooReceiver], named: Sequence[Named], dtype: str) -> list[Named]:
    """What arrives, all of it kept until everything is there."""
    sender, receiver = group
    weights = Weights.of(named, dtype)
    done: Future[None] = Future()

    def send() -> None:
        try:
            done.set_result(sender.send(weights.tensors(), weights.manifest))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=send, daemon=True).start()
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
            send = partial(sender.send, weights.tensors(), weights.manifest)
            collective._watched(send, {}, Alive(), time.monotonic() + 20)  # type: ignore[arg-type]
        except LinkError:  # as in a push: while this error is dealt with
            sender.close()
            with pytest.raises(LinkError, match="broke off"):
                waiting.result(5)
        else:
            pytest.fail("the push did not break off")
