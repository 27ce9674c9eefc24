"""The CUDA IPC transport between real processes, with mapped files for the memory of GPUs and a record of all calls."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import queue
import signal
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_rft as rft
from lightning_rft.errors import ConfigurationError, LinkError, TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.sync.transports import collective
from lightning_rft.sync.transports.ipc import IPCLink, IPCSender
from lightning_rft.sync.transports.pieces import pieces
from lightning_rft.sync.transports.transport import Named, Weights, announce, nbytes
from tests.processes import Script, until
from tests.sync.cuda_on_cpu import Stream
from tests.sync.ipc_halves import KILL, STOP, Blow
from tests.sync.ipc_on_cpu import IPC, REFUSES, Noted, noted
from tests.sync.small_buckets import with_buckets

DEVICE = torch.device("cuda:1")  # not the one that a thread begins with
LIMIT_S = 20.0
SEEN = [4, 6, 7]  # GPUs that the trainer sees: its cuda:1 is the machine's sixth


class Process:
    """A process of an explorer's, on a GPU of the machine, which it sees under another number than the trainer."""

    def __init__(self, script: Script, connection: Connection, pid: int) -> None:
        self.script = script
        self.pid = pid
        self.answers: list[tuple[str, Any]] = []
        self.loads = False  # has been told to
        self.ended = threading.Event()
        self._connection = connection
        self._listens = threading.Thread(target=self._listen, daemon=True)
        self._listens.start()

    def tell(self, what: str, argument: Any, blow: Blow = None) -> None:
        with suppress(OSError):  # it is gone, which the listener hears
            self._connection.send((what, argument, blow))

    def _listen(self) -> None:
        try:
            while True:
                self.answers.append(pickle.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            self.ended.set()

    @property
    def settled(self) -> bool:
        """Whether it is not loading."""
        answered = [what for what, _ in self.answers if what != "connected"]
        return not self.loads or bool(answered) or self.ended.is_set()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        assert self.ended.wait(LIMIT_S)

    def close(self) -> None:
        if not self.ended.is_set():
            with suppress(OSError):
                self._connection.send(None)
        assert self.ended.wait(LIMIT_S), self.script.stderr
        self._listens.join(LIMIT_S)
        self._connection.close()

    def last(self, what: str) -> Any:
        """What came of the last thing that it was told."""
        until(lambda: self.answers and self.answers[-1][0] == what, f"{what} after {self.answers}", LIMIT_S)
        return self.answers[-1][1]


class Explorers:
    """Explorers as a transport sees them."""

    dtype = "bfloat16"
    nccl, ipc = False, True
    folder = Path()
    address = "127.0.0.1"

    def __init__(self) -> None:
        self.processes: dict[int, list[Process]] = {}
        self.absent: set[int] = set()  # never told to connect
        self.ended: dict[int, str] = {}
        self.links: list[IPCLink] = []
        #: For the process of an explorer that is next told to connect or load.
        self.blows: dict[tuple[str, int], Blow] = {}

    def members(self) -> dict[int, int]:
        alive = {explorer: [not each.ended.is_set() for each in those] for explorer, those in self.processes.items()}
        return {explorer: len(those) for explorer, those in alive.items() if all(those)}

    def connect(self, explorer: int, link: IPCLink) -> None:
        self.links.append(link)
        if explorer not in self.absent:
            for member, process in enumerate(self.processes[explorer]):
                process.tell("connect", (link, member), self.blows.pop(("connect", explorer), None))

    def load(self, explorer: int, manifest: Sequence[TensorInfo], version: int) -> None:
        for process in self.processes[explorer]:
            process.loads = True
            process.answers.clear()
            process.tell("load", manifest, self.blows.pop(("load", explorer), None))

    def raise_failures(self) -> None:
        for process in self._all(list(self.processes)):
            what, error = (process.answers or [("", None)])[-1]
            if what == "failed" and not isinstance(error, LinkError):
                raise error

    def wait_loaded(self, version: int, explorers: Sequence[int], timeout_s: float) -> list[int]:
        for process in self._all(explorers):
            until(lambda process=process: process.settled, "a load", LIMIT_S)
            if process.answers and process.answers[-1][0] == "failed":
                raise process.answers[-1][1]
        return []

    def end(self, explorers: Sequence[int], blame: str) -> None:
        for explorer in self.members().keys() & set(explorers):  # as a pool, which does nothing to those that are gone
            self.ended[explorer] = blame
            for process in self.processes.pop(explorer):
                process.kill()

    def settle(self, explorers: Sequence[int], timeout_s: float) -> list[int]:
        def stuck() -> list[int]:
            loading = {each for each in self.members() if not all(process.settled for process in self.processes[each])}
            return sorted(loading & set(explorers))

        with suppress(TimeoutError):
            until(lambda: not stuck(), "the end of a load", timeout_s)
        return stuck()

    def _all(self, explorers: Sequence[int]) -> list[Process]:
        return [process for explorer in explorers for process in self.processes.get(explorer, [])]


class World:
    """A test's processes and its record."""

    def __init__(self, start: Callable[..., Script], folder: Path, cuda: IPC) -> None:
        self.to = Explorers()
        self.cuda = cuda
        self.folder = folder
        self._start = start
        self._listener = Listener(family="AF_UNIX")
        self._listener._listener._socket.settimeout(60.0)  # type: ignore[attr-defined]
        self._all: list[Process] = []

    def run(self, call: str) -> tuple[Script, Connection, int]:
        """A half in a process of its own, which names its process id."""
        script = self._start(f"from tests.sync import ipc_halves, test_ipc\nipc_halves.{call}\nipc_halves.end()")
        connection = self._listener.accept()
        return script, connection, connection.recv()[1]

    def explorer(self, index: int, *gpus: int) -> list[Process]:
        """Starts one, with a process on each of the GPUs."""
        address = self._listener.address
        self.to.processes[index] = []
        for member, gpu in enumerate(gpus):
            sees, device = ([gpu], 0) if len(gpus) == 1 else (list(gpus), member)
            who = f"explorer {index}/{member}"
            started = self.run(f"explorer({address!r}, {who!r}, {str(self.folder)!r}, {sees}, {device})")
            self._all.append(Process(*started))
            self.to.processes[index].append(self._all[-1])
        return self.to.processes[index]

    def close(self) -> None:
        for process in self._all:
            process.close()
        self._listener.close()

    @property
    def record(self) -> list[Noted]:
        return noted(self.folder)

    def count(self, what: str) -> int:
        return sum(call.what == what for call in self.record)

    def assert_released(self) -> None:
        """Nothing is open, allocated or left, whoever died."""
        until(lambda: self.count("free") == self.count("allocate") > 0, f"the end of all buckets: {self.record}")
        assert not [path for path in self.folder.glob("gpu*") if "." not in path.name], "a bucket is left"
        assert self.cuda._limbo == []


@pytest.fixture
def world(start: Callable[..., Script], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    folder = tmp_path / "memory"
    folder.mkdir()
    made = World(start, folder, IPC.put_in_place(monkeypatch, "trainer", folder, SEEN))
    yield made
    made.close()


def transport(bucket_bytes: int = 64, timeout_s: float = LIMIT_S, backend: Any = "ipc") -> rft.CollectiveTransport:
    """With a bucket that is smaller than can be set."""
    return with_buckets(rft.CollectiveTransport(backend, timeout_s=timeout_s), bucket_bytes)


def policy(version: int) -> dict[str, torch.Tensor]:
    embedding = torch.arange(80.0).reshape(20, 4) + 1000 * version
    return {
        "embedding": embedding,
        "norm": torch.tensor(version + 0.5),
        "none": torch.empty(0, 3),
        "layer": torch.full((4, 6), version + 0.25).t(),  # not contiguous
        "steps": torch.arange(3) + version,
        "head": embedding,
    }


def weights(of: dict[str, torch.Tensor], dtype: str = "bfloat16") -> Weights:
    """As of a policy on a GPU."""
    return Weights(announce(of.items(), dtype), DEVICE, Weights.of(list(of.items()), dtype).tensors)


def push(by: rft.CollectiveTransport, version: int, to: Explorers, only: Sequence[int] | None = None) -> None:
    by.push(weights(policy(version), to.dtype), version, to, only)  # type: ignore[arg-type]


def assert_holds(processes: Sequence[Process], version: int, dtype: str = "bfloat16") -> None:
    for process in processes:
        held = process.last("loaded")
        assert list(held) == list(policy(version))
        for name, tensor in policy(version).items():
            expected = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
            assert held[name].dtype == expected.dtype and torch.equal(held[name], expected), name


# What arrives

# The trainer's weights are on GPU 6. An explorer on it; one elsewhere; two on one; one of two GPUs; and one beside it.
LAYOUTS = [{3: (6,)}, {3: (4,)}, {3: (6,), 5: (6,)}, {3: (6,), 5: (7,)}, {3: (6, 7)}, {3: (4, 7), 5: (6,)}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_byte_arrives(layout: dict[int, tuple[int, ...]], world: World) -> None:
    for explorer, gpus in layout.items():
        world.explorer(explorer, *gpus)
    by = transport()
    for version in (0, 1):
        push(by, version, world.to)
        for processes in world.to.processes.values():
            assert_holds(processes, version)
    by.close()
    assert len(world.to.links) == len(layout)  # joined once
    gpus = {6, *(gpu for each in layout.values() for gpu in each)}
    assert world.count("allocate") == 2 * len(gpus)  # one a device, in each push
    assert {call.other for call in world.record if call.what == "allocate"} == {64}
    world.assert_released()


@pytest.mark.parametrize("bucket_bytes", [16, 48, 176, 1 << 20])
def test_a_bucket_is_never_larger_than_it_is_set_and_takes_what_is(bucket_bytes: int, world: World) -> None:
    world.explorer(0, 6)
    world.to.dtype = "float32"
    by = transport(bucket_bytes)
    push(by, 0, world.to)
    assert_holds(world.to.processes[0], 0, "float32")
    (size,) = (call.other for call in world.record if call.what == "allocate")
    everything = sum(nbytes(info) for info in announce(policy(0).items(), "float32") if info.same_as is None)
    assert size <= min(bucket_bytes, everything)
    by.close()


def test_what_is_tied_travels_once() -> None:
    manifest = announce(policy(0).items(), "bfloat16")
    held = pieces(manifest, 64)
    sent = [piece for each in held for piece in each]
    assert {piece.info.name for piece in sent} == set(policy(0)) - {"head"}
    assert sum(piece.stop - piece.start for piece in sent) == 80 + 1 + 24 + 3
    for each in held:
        ends = [0, *(piece.end for piece in each)]
        assert all(piece.offset % 16 == 0 and piece.offset >= end for piece, end in zip(each, ends, strict=False))
        assert ends[-1] <= 64


def test_the_setting_is_the_buckets_size(world: World) -> None:
    world.explorer(0, 6)
    by = rft.CollectiveTransport("ipc", bucket_mib=3)
    push(by, 0, world.to)
    assert world.to.links[0].bucket_bytes == 3 << 20
    assert "secret" not in repr(world.to.links[0])
    by.close()


def test_nothing_to_send(world: World) -> None:
    world.explorer(0, 6)
    by = transport()
    by.push(weights({}), 0, world.to)  # type: ignore[arg-type]
    assert world.to.processes[0][0].last("loaded") == {}
    assert world.count("allocate") == 0
    by.push(weights({"none": torch.empty(0)}), 1, world.to)  # type: ignore[arg-type]
    assert world.to.processes[0][0].last("loaded")["none"].shape == (0,)
    by.close()
    world.assert_released()


@pytest.mark.parametrize("sent", [["norm"], []], ids=["another", "nothing"])
def test_what_was_announced_must_be_sent(sent: list[str], world: World) -> None:
    world.explorer(0, 6)
    manifest = announce([("layer", torch.ones(2))], "bfloat16")
    other = Weights(manifest, DEVICE, lambda: iter([(name, torch.ones(2)) for name in sent]))
    by = transport()
    with pytest.raises(TransportError, match=f"layer was announced, but {(sent or ['nothing'])[0]} was to be sent"):
        by.push(other, 0, world.to)  # type: ignore[arg-type]
    assert isinstance(world.to.processes[0][0].last("failed"), LinkError)
    world.assert_released()


# In which order


def test_the_optimizer_is_waited_for(world: World) -> None:
    """It is queued on the trainer's stream, which need not be the default one."""
    world.explorer(0, 6)
    now, stream = policy(0), Stream(cuda=world.cuda)

    def tensors() -> Iterator[Named]:
        for name, tensor in Weights.of(list(now.items()), "bfloat16").tensors():
            made = torch.zeros_like(tensor)
            stream.work.append(lambda made=made, tensor=tensor: made.copy_(tensor))  # a gathering, queued
            yield name, made

    by = transport()
    with world.cuda.stream(stream):
        by.push(Weights(announce(now.items(), "bfloat16"), DEVICE, tensors), 0, world.to)  # type: ignore[arg-type]
    assert_holds(world.to.processes[0], 0)
    by.close()


def test_a_copy_is_not_waited_for(world: World) -> None:
    world.explorer(0, 6)
    by = transport()
    copy = weights(policy(0))
    assert by.snapshot(copy, world.to).device == DEVICE  # type: ignore[arg-type]
    by.push(replace(copy, copied=True), 0, world.to)  # type: ignore[arg-type]
    assert_holds(world.to.processes[0], 0)
    assert world.count("wait") == 0
    by.close()


def test_calls_and_their_order(world: World) -> None:
    """Of both processes, in the order in which they happened."""
    world.explorer(0, 6)
    by = transport(bucket_bytes=128)
    named = {"a": torch.ones(40), "b": torch.ones(20), "c": torch.ones(7)}
    by.push(weights(named), 0, world.to)  # type: ignore[arg-type]
    by.close()
    record = world.record
    assert {call.thread for call in record if call.who == "trainer"} == {"weight-push"}  # nothing on the trainer's own
    # the trainer on its GPU, the explorer on the only one that it sees
    assert {(call.who, call.device) for call in record} == {("trainer", "cuda:1"), ("explorer 0/0", "cuda:0")}
    named_calls = [(call.who.split()[0], f"{call.what} {call.other}".removesuffix(" None")) for call in record]
    trainer = [what for who, what in named_calls if who == "trainer"]
    assert [what.split()[0] if what.startswith("wait") else what for what in trainer] == [
        "allocate 120", "share 6", "say handle",
        "wait", "keep 40", "wait", "keep 20", "synchronize", "say filled",
        "wait", "keep 7", "synchronize", "say filled",
        "drop", "free", "collect",
    ]  # fmt: skip
    assert [what for who, what in named_calls if who == "explorer"] == [
        "open 6", "synchronize", "say taken", "synchronize", "close", "say closed",
    ]  # fmt: skip
    order = [f"{who}: {what}" for who, what in named_calls]
    first = order.index
    assert first("trainer: say filled") < first("explorer: synchronize") < first("explorer: say taken")
    assert first("explorer: say taken") < first("trainer: keep 7")  # it fills what was taken
    assert first("explorer: close") < first("trainer: drop")


def test_other_devices_get_a_copy_before_it_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.explorer(0, 7)
    by = transport(bucket_bytes=1024)
    push(by, 0, world.to)
    assert [call.other for call in world.record if call.what == "share"] == [7]  # the bucket beside the weights is not
    assert_holds(world.to.processes[0], 0)
    by.close()


def test_tensors_are_released(world: World) -> None:
    """Of weights that are gathered one by one, no more exist than are being packed; an explorer's are its own."""
    world.explorer(0, 6)
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def gathered() -> Iterator[Named]:
        for version in range(12):
            tensor = torch.full((4, 4), float(version))  # 32 bytes when packed: two of them are a bucket
            made.append(weakref.ref(tensor))
            yield "layer", tensor
            del tensor
            alive.append(sum(ref() is not None for ref in made))

    by = transport()
    gc.disable()
    try:
        manifest = [TensorInfo("layer", "bfloat16", (4, 4))] * 12
        by.push(Weights(manifest, DEVICE, gathered), 0, world.to)  # type: ignore[arg-type]
        assert sum(ref() is not None for ref in made) == 0
    finally:
        gc.enable()
    assert max(alive) <= 2  # one waits to be taken, one is being cast
    assert torch.equal(world.to.processes[0][0].last("loaded")["layer"], torch.full((4, 4), 11.0))
    by.close()


# Who joins, leaves and dies


def test_one_joins_and_one_leaves(world: World) -> None:
    first = world.explorer(0, 6)
    by = transport()
    push(by, 0, world.to)
    second = world.explorer(1, 4)
    push(by, 0, world.to, only=[1])  # came up between two pushes
    assert_holds(second, 0)
    push(by, 1, world.to)
    assert_holds([*first, *second], 1)
    first[0].kill()
    push(by, 2, world.to)
    assert_holds(second, 2)
    by.close()
    world.assert_released()


#: When: as it connects, opens the bucket, has copied and not said so, has said so, has closed it and not said so.
PHASES = [("connect", "never"), *(("load", at) for at in ("open", "synchronize", "say", "close"))]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: f"{phase[0]} {phase[1]}")
@pytest.mark.parametrize("gpus", [(6, 6), (6, 7)], ids=str)
def test_a_death_in_mid_push_costs_the_others_nothing(phase: Any, gpus: tuple[int, int], world: World) -> None:
    stays, goes = world.explorer(0, gpus[0]), world.explorer(1, gpus[1])
    by = transport()
    if phase[0] == "load":
        push(by, 0, world.to)
        world.to.blows["load", 1] = (KILL, phase[1], 1)
    else:
        world.to.absent = {1}
        threading.Timer(0.2, goes[0].kill).start()
    began = time.monotonic()
    push(by, 1, world.to)
    assert time.monotonic() - began < LIMIT_S / 2
    assert goes[0].ended.is_set()
    assert_holds(stays, 1)
    assert world.to.ended == {}
    push(by, 2, world.to)
    assert_holds(stays, 2)
    by.close()
    world.assert_released()


def test_what_a_dead_one_had_open_is_taken_back(world: World) -> None:
    world.explorer(0, 6)
    world.to.blows["load", 0] = (KILL, "synchronize", 1)
    by = transport()
    push(by, 0, world.to)
    by.close()
    world.assert_released()
    assert world.count("take back") == 1


def test_one_of_several_processes_that_dies_takes_its_explorer_along(world: World) -> None:
    stays, goes = world.explorer(0, 6), world.explorer(1, 6, 7)
    by = transport()
    push(by, 0, world.to)
    world.to.blows["load", 1] = (KILL, "open", 1)
    push(by, 1, world.to)
    assert_holds(stays, 1)
    assert isinstance(goes[1].last("failed"), LinkError)
    by.close()
    world.assert_released()


def test_a_missing_member_costs_one_deadline(world: World) -> None:
    stays = world.explorer(0, 6)
    world.explorer(1, 6)
    world.to.absent = {1}
    by = transport(timeout_s=1.0)
    began = time.monotonic()
    push(by, 0, world.to)
    assert 1.0 < time.monotonic() - began < 2.0 + LIMIT_S / 4
    assert list(world.to.ended) == [1]
    assert "did not join the weight transport in time" in world.to.ended[1]
    assert_holds(stays, 0)
    by.close()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "weight-push"], "its thread's end")


def test_one_that_stops_in_mid_push_costs_one_deadline_and_its_bucket_is_freed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collective, "_SETTLE_S", 0.5)
    stopped = world.explorer(0, 6)
    by = transport(timeout_s=1.5)
    world.to.blows["load", 0] = (STOP, "synchronize", 1)
    began = time.monotonic()
    push(by, 0, world.to)  # nobody is left to be pushed to
    assert 1.5 < time.monotonic() - began < 2.0 + LIMIT_S / 4
    assert world.to.ended == {
        0: "did not load version 0 in time: raise CollectiveTransport(timeout_s=...), or see its log"
    }
    assert stopped[0].ended.is_set()
    by.close()
    world.assert_released()


def test_a_push_that_is_late_is_not_tried_again(world: World) -> None:
    """The explorer waits in vain for a bucket that the trainer's GPU never fills; both end with the push."""
    world.explorer(0, 6)
    by, end = transport(timeout_s=1.0), threading.Event()
    world.cuda.happens = lambda what, number: assert_ends(end) if (what, number) == ("synchronize", 1) else None
    try:
        with pytest.raises(LinkError, match=r"passed its deadline: raise CollectiveTransport\(timeout_s=...\)"):
            push(by, 0, world.to)
        assert len(world.to.links) == 1
    finally:
        end.set()
    assert isinstance(world.to.processes[0][0].answers[-1][1], LinkError)
    world.assert_released()


#: When the trainer dies: before it gives the handle, fills a bucket, says so, fills another one, or frees it.
TRAINER = [("say", 1), ("synchronize", 1), ("say", 2), ("synchronize", 2), ("drop", 1)]


@pytest.mark.parametrize("at", TRAINER, ids=str)
def test_the_trainers_death_frees_the_explorer(at: tuple[str, int], world: World) -> None:
    (process,) = world.explorer(0, 4)
    script, trainer, _ = world.run(f"trainer({world._listener.address!r}, {str(world.folder)!r}, [4], test_ipc.policy)")
    trainer.send((KILL, *at))
    began = time.monotonic()
    process.tell("connect", (trainer.recv()[1], 0))
    process.last("connected")
    process.tell("load", trainer.recv()[1])
    if at[0] == "drop":  # everything had arrived
        assert_holds([process], 0, "float32")
    else:
        assert isinstance(process.last("failed"), LinkError)
    assert time.monotonic() - began < LIMIT_S / 2
    assert script.wait() == -signal.SIGKILL
    trainer.close()
    assert world.count("open") == world.count("close") == (0 if at == ("say", 1) else 1)


def test_an_explorer_waits_no_longer_than_the_deadline(world: World) -> None:
    (process,) = world.explorer(0, 4)
    sender = IPCSender(torch.device("cuda:0"), 1.0, 64)
    sender.join(world.to, {0: 1})  # type: ignore[arg-type]
    began = time.monotonic()
    process.tell("load", announce(policy(0).items(), "bfloat16"))
    assert "nothing came within" in str(process.last("failed"))
    assert 1.0 <= time.monotonic() - began < 1.0 + LIMIT_S / 4
    sender.close()


def test_a_sender_that_is_closed_first_waits_for_nobody(world: World) -> None:
    world.explorer(0, 6)
    world.to.absent = {0}
    sender = IPCSender(DEVICE, LIMIT_S, 64)
    assert sender.absent() == [] and not sender.joined
    sender.close()
    sender.close()
    sender.join(world.to, {0: 1})  # type: ignore[arg-type]
    assert not sender.joined and sender.absent() == [0]


def test_what_listens_ends_when_all_have_met(world: World) -> None:
    (process,) = world.explorer(0, 6)
    by = transport()
    push(by, 0, world.to)
    link = world.to.links[0]
    process.tell("connect", (replace(link, timeout_s=0.5), 0))
    assert isinstance(process.last("failed"), LinkError)
    by.close()


def test_a_stranger_is_not_let_in(world: World) -> None:
    """Neither one without the secret at the trainer's port, nor an explorer at a stranger's."""
    (process,) = world.explorer(0, 6)
    other = IPCSender(DEVICE, LIMIT_S, 64)
    invited: list[IPCLink] = []
    world.to.connect = lambda explorer, link: invited.append(link)  # type: ignore[method-assign]
    joins = threading.Thread(target=other.join, args=(world.to, {0: 1}))
    joins.start()
    until(lambda: invited, "an invitation")
    process.tell("connect", (replace(invited[0], secret=bytes(32)), 0))
    assert "does not take this secret" in str(process.last("failed"))
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        process.answers.clear()
        process.tell("connect", (replace(invited[0], port=stranger.getsockname()[1], timeout_s=0.3), 0))
        assert isinstance(process.last("failed"), LinkError)
    assert other.absent() == [0]
    other.close()
    joins.join(LIMIT_S)


# What cannot work


def test_a_gpu_that_the_trainer_does_not_see_is_refused(world: World) -> None:
    world.explorer(2, 5)
    by = transport()
    with pytest.raises(ConfigurationError, match=r"explorer 2 computes on GPU 00000005-.*: set .*backend='gloo'"):
        push(by, 0, world.to)


@pytest.mark.parametrize("what", ["shared", "opened"])
def test_memory_that_cannot_be_shared_says_what_to_set(
    what: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (process,) = world.explorer(0, 6)

    def fails(*shared: Any) -> Any:
        del shared  # which the traceback would keep
        raise RuntimeError("CUDA error: operation not supported")

    if what == "shared":
        monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", fails, raising=False)
    else:
        (world.folder / REFUSES).touch()
    by = transport()
    with pytest.raises(TransportError, match=rf"{what} between .*not supported.*set .*backend='gloo'") as caught:
        push(by, 0, world.to)
    assert not isinstance(caught.value, LinkError)
    assert isinstance(process.last("failed"), TransportError)
    world.assert_released()


def assert_ends(event: threading.Event) -> None:
    assert event.wait(LIMIT_S)


# vLLM's half


@pytest.fixture
def vllm_weights() -> Any:
    """Imports it before torch is made to look as if there were GPUs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own modules, which vLLM imports
        return importlib.import_module("lightning_rft.explorer.engines.vllm_weights")


@pytest.mark.vllm
def test_a_vllm_worker_opens_the_bucket_of_its_own_gpu(vllm_weights: Any, world: World) -> None:
    """Two workers of a tensor-parallel engine, each on a thread whose current GPU is the first."""
    held: list[dict[str, torch.Tensor]] = [{}, {}]
    engines = []
    for member in range(2):
        parallel = SimpleNamespace(rank=member, data_parallel_index=0, world_size=2)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)

        class Model(torch.nn.Module):
            def load_weights(self, weights: Any, rows: int = member) -> None:
                held[rows] |= {name: tensor.tensor_split(2)[rows] for name, tensor in weights}

        device = torch.device("cuda", 1 + member)
        engines.append(vllm_weights.LinkWeightTransferEngine(None, config, device, Model()))
    sender, invited = IPCSender(DEVICE, LIMIT_S, 64), queue.Queue[IPCLink]()
    world.to.connect = lambda explorer, link: invited.put(link)  # type: ignore[method-assign]
    sent = weights({"a": torch.arange(60.0), "b": torch.arange(7.0)})
    with ThreadPoolExecutor(3) as threads:
        joined = threads.submit(sender.join, world.to, {0: 2})  # type: ignore[arg-type]
        link = invited.get(timeout=LIMIT_S)
        for engine in engines:
            threads.submit(engine.init_transfer_engine, vllm_weights.LinkInitInfo(link)).result(LIMIT_S)
        joined.result(LIMIT_S)
        update = vllm_weights.ManifestUpdateInfo(sent.manifest)
        loads = [threads.submit(engine.receive_weights, update) for engine in engines]
        sender.send(sender.begin(sent), sent.manifest)
        for load in loads:
            load.result(LIMIT_S)
        for engine in engines:
            threads.submit(engine.shutdown).result(LIMIT_S)
    sender.close()
    for name, tensor in {"a": torch.arange(60.0), "b": torch.arange(7.0)}.items():
        assert torch.equal(torch.cat([each[name] for each in held]), tensor.bfloat16())
    assert {(call.device, call.other) for call in world.record if call.what == "open"} == {("cuda:1", 6), ("cuda:2", 7)}
    assert {call.device for call in world.record if call.what == "close"} == {"cuda:1", "cuda:2"}
    world.assert_released()
