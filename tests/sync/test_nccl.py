"""The NCCL transport from end to end, trainer's half and vLLM's own, with Gloo for NCCL and a CPU for GPUs."""

from __future__ import annotations

import gc
import importlib
import itertools
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_rft as rft
from lightning_rft.errors import ConfigurationError, LinkError, TransportError
from lightning_rft.experience import GroupKey, TensorInfo
from lightning_rft.run.pusher import Pusher
from lightning_rft.sync.actions import Action, Issue, Lease, Load
from lightning_rft.sync.order import Order
from lightning_rft.sync.schedule import Schedule
from lightning_rft.sync.transports.nccl import NCCLLink, NCCLSender
from lightning_rft.sync.transports.transport import Named, Weights, announce
from lightning_rft.trainer.scoring import Announcement, Scores
from tests.explorer.links import MemoryLink
from tests.sync.cuda_on_cpu import CUDA, Stream
from tests.sync.small_buckets import with_buckets

pytestmark = pytest.mark.vllm

DEVICE = torch.device("cuda:1")  # not the one that a thread begins with
LIMIT_S = 20.0


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    """Imports it, which takes too long to do whenever tests are collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own modules, which vLLM imports
        importlib.import_module("lightning_rft.explorer.engines.vllm_weights")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CUDA:
    return CUDA.put_in_place(monkeypatch)


class Policy(torch.nn.Module):
    """A model as vLLM's are, of which a tensor-parallel worker has its rows alone; a tied head is a copy here."""

    NAMES = ("embedding", "norm", "layer", "head")

    def __init__(self, member: int, size: int) -> None:
        super().__init__()
        self.member, self.size = member, size
        self.held: dict[str, torch.Tensor] = {}
        self.times: dict[str, int] = {}

    def load_weights(self, weights: Iterable[Named]) -> None:
        for name, tensor in weights:
            if name not in self.NAMES:
                raise KeyError(name)
            rows = tensor.tensor_split(self.size)[self.member] if tensor.ndim else tensor
            self.held[name] = rows.clone()
            self.times[name] = self.times.get(name, 0) + 1


class Worker(threading.Thread):
    """A weight-holding process of an engine: vLLM's worker with its weight-transfer engine, on a thread."""

    def __init__(self, explorer: int, member: int, size: int) -> None:
        super().__init__(name=f"explorer-{explorer}-{member}", daemon=True)
        self.model = Policy(member, size)
        parallel = SimpleNamespace(rank=member, data_parallel_index=0, world_size=size)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        from lightning_rft.explorer.engines.vllm_weights import LinkWeightTransferEngine

        self.engine = LinkWeightTransferEngine(None, config, torch.device("cpu:0"), self.model)  # type: ignore[arg-type]
        self.asked: queue.Queue[tuple[Callable[..., Any], Any, Future[Any]] | None] = queue.Queue()
        self.version = -1
        self.start()

    def run(self) -> None:
        while (asked := self.asked.get()) is not None:
            function, argument, done = asked
            try:
                done.set_result(function(argument))
            except BaseException as error:
                error.__traceback__ = None
                done.set_exception(error)

    def ask(self, function: Callable[..., Any], argument: Any) -> Future[Any]:
        done: Future[Any] = Future()
        self.asked.put((function, argument, done))
        return done

    def die(self) -> None:
        """Its connections close."""
        group = getattr(self.engine._nccl, "model_update_group", None)
        if group is not None:
            group.destroy()


class Explorers:
    """Explorers in this process, as a transport sees them."""

    dtype = "bfloat16"
    nccl, ipc = True, False
    folder = Path()
    address = "127.0.0.1"

    def __init__(self, sizes: dict[int, int]) -> None:
        self.workers: dict[int, list[Worker]] = {}
        self.absent: set[int] = set()  # never come
        self.ended: dict[int, str] = {}
        self.loading: dict[int, list[Future[Any]]] = {}
        self.links: list[NCCLLink] = []
        self.text_ids: tuple[int, ...] = ()
        self.wanting: set[int] = set()  # weights, when the trainer has time
        #: Called when one has loaded, and when one is gone.
        self.loaded: Callable[[int, int], None] = lambda explorer, version: None
        self.gone: Callable[[int], None] = lambda explorer: None
        for explorer, size in sizes.items():
            self.add(explorer, size)

    def add(self, explorer: int, size: int = 1) -> None:
        self.workers[explorer] = [Worker(explorer, member, size) for member in range(size)]

    def members(self) -> dict[int, int]:
        assert len(self.links) < 20, "a push that has no end"
        return {explorer: len(workers) for explorer, workers in self.workers.items()}

    def connect(self, explorer: int, link: NCCLLink) -> None:
        from lightning_rft.explorer.engines.vllm_weights import LinkInitInfo

        self.links.append(link)
        if explorer not in self.absent:
            for worker in self.workers[explorer]:
                worker.ask(worker.engine.init_transfer_engine, LinkInitInfo(link))

    def load(self, explorer: int, manifest: Sequence[TensorInfo], version: int) -> None:
        from lightning_rft.explorer.engines.vllm_weights import ManifestUpdateInfo

        update = ManifestUpdateInfo(manifest)
        self.loading[explorer] = [
            worker.ask(worker.engine.receive_weights, update) for worker in self.workers[explorer]
        ]

    def late(self) -> list[int]:
        late, self.wanting = sorted(self.wanting & self.members().keys()), set()
        return late

    def raise_failures(self) -> None:
        for futures in list(self.loading.values()):
            for future in futures:
                error = future.exception() if future.done() else None
                if error is not None and not isinstance(error, LinkError):
                    raise error

    def wait_loaded(self, version: int, explorers: Sequence[int], timeout_s: float) -> list[int]:
        for explorer in explorers:
            for future in self.loading[explorer]:
                future.result(LIMIT_S)
            self.loaded(explorer, version)
        return []

    def end(self, explorers: Sequence[int], blame: str) -> None:
        for explorer in explorers:
            self.ended[explorer] = blame
            self.remove(explorer)

    def settle(self, explorers: Sequence[int], timeout_s: float) -> list[int]:
        for explorer in self.members().keys() & set(explorers):
            for future in self.loading.get(explorer, ()):
                future.exception(LIMIT_S)
        return []

    def remove(self, explorer: int) -> list[Worker]:
        self.gone(explorer)  # first: a run hears of a death under one lock, and here a push may break off in between
        workers = self.workers.pop(explorer)
        for worker in workers:
            worker.die()
            worker.asked.put(None)
        return workers

    def close(self) -> None:
        for explorer in list(self.workers):
            self.remove(explorer)


@pytest.fixture
def explorers() -> Iterator[Callable[..., Explorers]]:
    made: list[Explorers] = []

    def make(**sizes: int) -> Explorers:
        made.append(Explorers({int(name[1:]): size for name, size in sizes.items()}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def transport(
    bucket_bytes: int = 64, timeout_s: float = LIMIT_S, background: Any = "snapshot"
) -> rft.CollectiveTransport:
    """With buckets that are smaller than can be set."""
    return with_buckets(rft.CollectiveTransport("nccl", timeout_s=timeout_s, background=background), bucket_bytes)


def policy(version: int) -> dict[str, torch.Tensor]:
    embedding = torch.arange(80.0).reshape(20, 4) + 1000 * version
    return {
        "embedding": embedding,
        "norm": torch.tensor(version + 0.5),
        "layer": torch.full((4, 6), version + 0.25).t(),  # not contiguous
        "head": embedding,
    }


def weights(of: dict[str, torch.Tensor], dtype: str = "bfloat16") -> Weights:
    """As of a policy on a GPU."""
    return Weights(announce(of.items(), dtype), DEVICE, Weights.of(list(of.items()), dtype).tensors)


def push(by: rft.CollectiveTransport, version: int, to: Explorers, only: Sequence[int] | None = None) -> None:
    by.push(weights(policy(version), to.dtype), version, to, only)  # type: ignore[arg-type]


def assert_holds(workers: Sequence[Worker], version: int, dtype: str = "bfloat16") -> None:
    for name, tensor in policy(version).items():
        parts = [worker.model.held[name] for worker in workers]
        whole = torch.cat(parts) if tensor.ndim else parts[0]
        assert torch.equal(whole, tensor.to(getattr(torch, dtype))), name


# What arrives


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [{"e3": 1}, {"e3": 1, "e5": 1}, {"e3": 2}, {"e3": 2, "e5": 1}], ids=str)
def test_every_byte_arrives(sizes: dict[str, int], dtype: str, cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(**sizes), transport()
    to.dtype = dtype
    for version in (0, 1):
        push(by, version, to)
        for workers in to.workers.values():
            assert_holds(workers, version, dtype)
            assert set(workers[0].model.times.values()) == {version + 1}
    assert len(cuda.groups) == 1 + sum(sizes.values())  # joined once
    by.close()


def test_what_is_tied_travels_once_in_buckets_of_the_size_that_is_set(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1), transport(bucket_bytes=40)
    push(by, 0, to)
    sizes = [call.size for call in cuda.calls if call.what == "broadcast" and call.other == 0]
    assert sizes == [160, 50]  # of bfloat16: embedding; norm and layer, which is what goes beyond 40 bytes
    assert [call.size for call in cuda.calls if call.what == "broadcast" and call.other == 1] == sizes
    engine = to.workers[0][0].engine._nccl
    assert (engine.packed_buffer_size_bytes, engine.packed_num_buffers) == (40, 1)
    by.close()


def test_the_setting_is_the_buckets_size(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1), rft.CollectiveTransport("nccl", bucket_mib=3)
    push(by, 0, to)
    assert to.links[0].bucket_bytes == 3 << 20
    assert to.workers[0][0].engine._nccl.packed_buffer_size_bytes == 3 << 20
    by.close()
    with pytest.raises(ConfigurationError, match=r"bucket_mib=0\) must be at least 1"):
        rft.CollectiveTransport(bucket_mib=0)


def test_an_invitation(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e3=1, e5=2), transport(timeout_s=7.0)
    push(by, 0, to)
    assert [(link.rank, link.world_size, link.timeout_s) for link in to.links] == [(1, 4, 7.0), (2, 4, 7.0)]
    assert "unique_id" not in repr(to.links[0])
    with pytest.raises(TransportError, match="backend='gloo'"):
        to.links[0].open(0)
    by.close()


def test_a_name_that_the_model_does_not_know_ends_the_run(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1), transport()
    with pytest.raises(TransportError, match="does not know a tensor that the trainer sent: 'extra'") as caught:
        by.push(weights({"extra": torch.ones(400)}), 0, to)
    assert not isinstance(caught.value, LinkError)
    to = explorers(e0=1)
    only_alias = {"embedding": torch.ones(2)} | dict.fromkeys(("lost", "lm_head"), torch.zeros(3))
    with pytest.raises(TransportError, match=r"does not know .* 'lost'"):
        by.push(weights(only_alias), 0, to)


@pytest.mark.parametrize("sent", [["norm"], []], ids=["another", "nothing"])
def test_what_was_announced_must_be_sent(sent: list[str], cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1), transport()
    manifest = announce([("layer", torch.ones(2))], "bfloat16")
    other = Weights(manifest, DEVICE, lambda: iter([(name, torch.ones(2)) for name in sent]))
    with pytest.raises(TransportError, match=f"layer was announced, but {(sent or ['nothing'])[0]} was to be sent"):
        by.push(other, 0, to)


def test_what_vllm_could_not_read_is_refused(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1), transport()
    with pytest.raises(TransportError, match=r"layer \(int64\) follows tensors .*backend='gloo'"):
        by.push(weights({"norm": torch.ones(3), "layer": torch.ones(4, dtype=torch.int64)}), 0, to)
    to, by = explorers(e0=1), transport()
    by.push(weights({"norm": torch.ones(4), "layer": torch.arange(8)}), 0, to)
    assert torch.equal(to.workers[0][0].model.held["layer"], torch.arange(8))
    by.close()


# In which order


def test_the_optimizer_is_waited_for(cuda: CUDA, explorers: Any) -> None:
    """It is queued on the trainer's stream, which need not be the default one."""
    to, by = explorers(e0=1), transport()
    now, stream = policy(0), Stream(cuda=cuda)

    def tensors() -> Iterator[Named]:
        for name, tensor in Weights.of(list(now.items()), "bfloat16").tensors():
            made = torch.zeros_like(tensor)
            stream.work.append(lambda made=made, tensor=tensor: made.copy_(tensor))  # a gathering, queued
            yield name, made

    with cuda.stream(stream):
        by.push(Weights(announce(now.items(), "bfloat16"), DEVICE, tensors), 0, to)
    assert_holds(to.workers[0], 0)
    by.close()


def test_calls_and_their_order(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1), transport(bucket_bytes=40)
    push(by, 0, to)
    trainers = [call for call in cuda.calls if call.thread == "weight-push"]
    assert {call.device for call in trainers} == {DEVICE}
    engines = [call for call in cuda.calls if call.thread == "explorer-0-0"]
    assert {call.device for call in engines} == {torch.device("cpu:0")}
    assert len(trainers) + len(engines) == len(cuda.calls)  # nothing on the trainer's own thread
    assert trainers[0].what == "join"
    assert trainers[0].other == (0, DEVICE)
    bucket = ["wait", "keep"]
    assert [call.what for call in trainers[1:]] == [
        *bucket, "broadcast", "synchronize",  # embedding
        *bucket, *bucket, "broadcast", "synchronize",  # norm, layer
    ]  # fmt: skip
    packs = {call.stream for call in trainers[1:]}
    assert len(packs) == 1
    assert {call.other for call in trainers if call.what == "wait"} == {cuda.current_stream(DEVICE)}
    assert [call.size for call in trainers if call.what == "keep"] == [80, 1, 24]
    by.close()


def test_tensors_are_released(cuda: CUDA, explorers: Any) -> None:
    """Of weights that are gathered one by one, no more exist than are being packed; afterwards none."""
    to, by = explorers(e0=1), transport(bucket_bytes=40)
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def gathered() -> Iterator[Named]:
        for version in range(12):
            tensor = torch.full((4, 5), float(version))  # 40 bytes when packed: with the next one, a bucket
            made.append(weakref.ref(tensor))
            yield "layer", tensor
            del tensor
            alive.append(sum(ref() is not None for ref in made))

    manifest = [TensorInfo("layer", "bfloat16", (4, 5))] * 12
    gc.disable()
    try:
        by.push(Weights(manifest, DEVICE, gathered), 0, to)
        assert sum(ref() is not None for ref in made) == 0
    finally:
        gc.enable()
    assert max(alive) <= 2  # one waits to be taken, one is being cast
    by.close()


# Who joins, leaves and dies


def test_one_joins_and_one_leaves(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1), transport()
    push(by, 0, to)
    to.add(1)
    push(by, 0, to, only=[1])  # came up between two pushes
    assert_holds(to.workers[1], 0)
    push(by, 1, to)
    gone = to.remove(0)
    push(by, 2, to)
    assert_holds(to.workers[1], 2)
    assert_holds(gone, 1)
    by.close()
    trainers = [group for group in cuda.groups if group.rank == 0]
    assert len(trainers) == 4
    until(lambda: all(group.destroyed_by == ["nccl-shutdown"] for group in trainers))
    engines = [group for group in cuda.groups if group.rank != 0]
    alive = to.workers[1][0].engine._nccl.model_update_group
    assert [group for group in engines if not group.destroyed_by] == [alive]  # others were left for a newer one


@pytest.mark.parametrize("forgets", [False, True], ids=["as it is", "before 0.32"])
def test_an_engine_leaves_as_vllm_does_and_breaks_its_connections(
    forgets: bool, cuda: CUDA, explorers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    to, by = explorers(e0=1), transport()
    push(by, 0, to)
    engine = to.workers[0][0].engine
    nccl = engine._nccl
    group = nccl.model_update_group
    if forgets:
        monkeypatch.setattr(type(nccl), "shutdown", lambda engine: setattr(engine, "model_update_group", None))
    engine.shutdown()
    assert nccl.model_update_group is None
    destroyed = list(group.destroyed_by)
    assert destroyed
    engine.shutdown()
    assert group.destroyed_by == destroyed
    by.close()


def test_an_engine_that_has_joined_nothing_refuses_weights(cuda: CUDA, explorers: Any) -> None:
    from lightning_rft.explorer.engines.vllm_weights import LinkInitInfo, ManifestUpdateInfo

    (worker,) = explorers(e0=1).workers[0]
    with pytest.raises(TransportError, match="announced before the transport was joined"):
        worker.ask(worker.engine.receive_weights, ManifestUpdateInfo([])).result(LIMIT_S)
    worker.ask(worker.engine.init_transfer_engine, LinkInitInfo()).result(LIMIT_S)  # nor by no link
    with pytest.raises(TransportError, match="announced before the transport was joined"):
        worker.ask(worker.engine.receive_weights, ManifestUpdateInfo([])).result(LIMIT_S)


def test_an_engine_goes_from_nccl_to_another_link_and_back(cuda: CUDA, explorers: Any) -> None:
    from lightning_rft.explorer.engines.vllm_weights import LinkInitInfo, ManifestUpdateInfo

    to, by, link = explorers(e0=2), transport(), MemoryLink()
    push(by, 0, to)
    worker = to.workers[0][1]
    group = worker.engine._nccl.model_update_group
    worker.ask(worker.engine.init_transfer_engine, LinkInitInfo(link)).result(LIMIT_S)
    assert link.opened == [1]
    assert group.destroyed_by
    update = ManifestUpdateInfo(link.push(policy(1)))
    worker.ask(worker.engine.receive_weights, update).result(LIMIT_S)
    assert torch.equal(worker.model.held["norm"], torch.tensor(1.5))
    by.close()
    by = transport()
    push(by, 2, to)
    assert_holds(to.workers[0], 2)
    assert link.closed == 1
    worker.engine.shutdown()
    assert link.closed == 1
    by.close()


def test_death_in_mid_push_costs_the_others_nothing(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1, e1=1), transport()
    push(by, 0, to)
    gone: list[int] = []

    def dies(rank: int, number: int) -> None:
        if (rank, number) == (0, 4):  # the second broadcast of this push
            gone.append(1)
            to.remove(1)

    cuda.broadcasting = dies
    push(by, 1, to)
    assert len(gone) == 1
    assert_holds(to.workers[0], 1)
    assert to.ended == {}
    by.close()


def test_a_missing_member_costs_one_deadline(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1, e1=1), transport(timeout_s=1.0)
    to.absent = {1}
    began = time.monotonic()
    push(by, 0, to)
    assert 1.0 < time.monotonic() - began < 2.0 + LIMIT_S / 4
    assert list(to.ended) == [1]
    assert "did not join the weight transport in time" in to.ended[1]
    assert_holds(to.workers[0], 0)
    assert [group.rank for group in cuda.groups].count(0) == 1  # no group was begun without the missing one
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "weight-push"])
    by.close()


def test_members_that_are_stuck_in_the_making_of_a_group_are_ended(cuda: CUDA, explorers: Any) -> None:
    to, by, end = explorers(e0=1, e1=1), transport(timeout_s=0.5), threading.Event()
    cuda.joining = lambda rank: None if rank else assert_ends(end)
    try:
        push(by, 0, to)
    finally:
        end.set()
    assert sorted(to.ended) == [0, 1]
    until(lambda: [group.destroyed_by for group in cuda.groups if group.rank == 0] == [["nccl-shutdown"]])


def test_a_group_that_cannot_be_made_is_tried_again_and_nobody_is_blamed(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1), transport()

    def fails(rank: int) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    cuda.joining = fails
    with pytest.raises(TransportError, match=r"broke off 3 times: .*unhandled system error"):
        push(by, 0, to)
    assert to.ended == {}
    assert len(to.links) == 3


def test_a_push_that_is_late_though_all_are_there_is_not_tried_again(cuda: CUDA, explorers: Any) -> None:
    to, by, end = explorers(e0=1), transport(timeout_s=0.5), threading.Event()
    cuda.broadcasting = lambda rank, number: None if rank else assert_ends(end)
    try:
        with pytest.raises(LinkError, match=r"passed its deadline: raise CollectiveTransport\(timeout_s=...\)"):
            push(by, 0, to)
    finally:
        end.set()
    assert len(to.links) == 1


def test_nccl_that_is_switched_off_is_refused(cuda: CUDA, explorers: Any) -> None:
    cuda.disabled = True
    with pytest.raises(TransportError, match="unset VLLM_DISABLE_PYNCCL"):
        push(transport(), 0, explorers(e0=1))


def test_a_sender_that_is_closed_first_waits_for_nobody(cuda: CUDA, explorers: Any) -> None:
    to, sender = explorers(e0=1), NCCLSender(DEVICE, LIMIT_S, 64)
    assert sender.absent() == []
    to.absent = {0}
    sender.close()
    sender.close()
    sender.join(to, {0: 1})
    assert not sender.joined
    assert cuda.groups == []


def test_the_store_ends_when_all_have_met(cuda: CUDA, explorers: Any) -> None:
    to, by = explorers(e0=1), transport()
    push(by, 0, to)
    (sender,) = by._senders.values()
    assert sender.joined
    with pytest.raises(LinkError):
        NCCLLink(**vars(to.links[0]) | {"timeout_s": 0.2}).come(0)
    by.close()


# Under strategies that do not wait for explorers


class OnGPU(torch.Tensor):
    """Copies of it within the GPU are queued on the stream on which they are asked for."""

    def to(self, *args: Any, **settings: Any) -> torch.Tensor:
        whole = self.as_subclass(torch.Tensor)
        if args[0] == "cpu":
            return whole.to(*args, **settings)
        copy = torch.zeros(self.shape, dtype=args[0])
        torch.cuda.current_stream(DEVICE).work.append(lambda: copy.copy_(whole))  # type: ignore[attr-defined]
        COPIES.append(weakref.ref(copy))
        return copy


COPIES: list[weakref.ref[torch.Tensor]] = []


class Training:
    """A trainer of which nothing is real but schedule and pusher, whose optimizer and weights are on a stream."""

    def __init__(self, rule: rft.SyncStrategy, to: Explorers, cuda: CUDA) -> None:
        self.to, self.stream = to, Stream(cuda=cuda)
        self.weights = policy(0)
        self.schedule = Schedule(Order(rule, size=lambda batch: 1))
        self.open: list[GroupKey] = []
        self.leased = False
        self.loads: list[tuple[int, int]] = []  # explorer, version
        self.failures: list[BaseException] = []
        self.lock = threading.RLock()
        self.pusher = Pusher(
            rule.transport,
            background=rule.asynchronous,
            roster=self,  # type: ignore[arg-type]
            receivers=to,  # type: ignore[arg-type]
            gathered=self.gathered,
            expect=lambda version, scores: None,
            pushed=lambda version: self.tell(self.schedule.pushed, version),
            failed=self.failures.append,
            observe=lambda *span: None,
        )
        to.loaded, to.gone = self.loaded, lambda explorer: self.tell(self.schedule.died, explorer)
        for explorer in to.members():
            self.tell(self.schedule.joined, explorer)
        self.push(0)

    def gathered(self, what: str, dtype: str) -> Iterator[Any]:
        if what == "scores":
            yield Scores((), (), 1.0, dtype)
            return
        on_gpu = [(name, tensor.as_subclass(OnGPU)) for name, tensor in self.weights.items()]
        yield Announcement(announce(on_gpu, dtype), DEVICE, (), frozenset())
        yield from Weights.of(on_gpu, dtype).tensors()

    def tell(self, event: Callable[..., list[Action]], *args: Any, **settings: Any) -> None:
        with self.lock:
            for action in event(*args, **settings):
                if isinstance(action, Issue):
                    self.open.append(action.group)
                elif isinstance(action, Load):
                    self.pusher.load(action.explorer)
                self.leased |= isinstance(action, Lease)

    def want_weights(self, explorer: int) -> None:
        self.to.wanting.add(explorer)

    def loaded(self, explorer: int, version: int) -> None:
        self.loads.append((explorer, version))
        self.tell(self.schedule.loaded, explorer, version, alone=self.pusher._as_asked)

    def push(self, version: int) -> None:
        with torch.cuda.stream(self.stream):  # type: ignore[arg-type]
            self.pusher.push(version)

    def train(self, pushes: bool = True) -> int:
        """Trains a batch, all of it queued on the stream; the next version."""
        self.leased = False
        batch = self.schedule.version
        self.tell(self.schedule.wanted, batch)
        until(lambda: bool(self.open) or self.leased)
        while not self.leased:
            self.tell(self.schedule.ready, self.open.pop(0))
        self.tell(self.schedule.trained, batch)
        self.stream.work.append(lambda: self.step(batch + 1))
        if pushes:
            self.push(batch + 1)
        return batch + 1

    def step(self, version: int) -> None:
        for name, tensor in policy(version).items():
            self.weights[name].copy_(tensor)

    def holds(self, version: int) -> bool:
        """Whether every explorer does."""
        assert not self.failures, self.failures
        return {explorer: held for explorer, held in self.loads if explorer in self.to.workers} == dict.fromkeys(
            self.to.workers, version
        )

    def assert_holds(self, version: int) -> None:
        for workers in self.to.workers.values():
            assert_holds(workers, version)


@pytest.fixture
def training(cuda: CUDA, explorers: Any) -> Iterator[Callable[..., Training]]:
    made: list[Training] = []

    def make(rule: Any, background: str, k: int = 1, timeout_s: float = LIMIT_S, **sizes: int) -> Training:
        COPIES.clear()
        by = transport(timeout_s=timeout_s, background=background)
        absent = {int(name[6:]) for name in sizes if name.startswith("absent")}
        to = explorers(**{name.replace("absent", "e"): size for name, size in sizes.items()})
        to.absent = absent
        made.append(Training(rule(k, max_staleness=4, transport=by), to, cuda))
        return made[-1]

    yield make
    for each in made:
        each.pusher.close()


@pytest.fixture(params=["snapshot", "blocking"])
def background(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[rft.FullyAsynchronous, rft.MultiExplorerAsynchronous], ids=["c", "d"])
def rule(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_every_version_arrives(rule: Any, background: str, cuda: CUDA, training: Any) -> None:
    of = training(rule, background, e0=1, e1=2)
    for version in (1, 2, 3):
        until(lambda version=version: of.holds(version - 1))
        of.assert_holds(version - 1)
        assert of.train() == version
        if background == "blocking":  # training went on only now
            assert of.holds(version)
    until(lambda: of.holds(3))
    of.assert_holds(3)
    together = rule is rft.FullyAsynchronous and background == "blocking"
    assert {link.world_size for link in of.to.links} == ({4} if together else {2, 3})
    assert len(of.to.links) == 2  # the groups last


def test_a_copy_is_of_its_version_whatever_is_trained_meanwhile(rule: Any, cuda: CUDA, training: Any) -> None:
    of, trained = training(rule, "snapshot", e0=1, e1=1), threading.Event()
    until(lambda: of.holds(0))
    cuda.broadcasting = lambda rank, number: None if rank else assert_ends(trained)
    of.train()
    of.stream.work.append(lambda: of.step(7))  # goes beyond what was pushed
    of.stream.run()
    assert torch.equal(of.weights["norm"], torch.tensor(7.5))
    trained.set()
    until(lambda: of.holds(1))
    of.assert_holds(1)


def test_training_waits_for_a_copy_alone(rule: Any, cuda: CUDA, training: Any) -> None:
    of, begun, end = training(rule, "snapshot", e0=1, e1=1), threading.Event(), threading.Event()

    def hangs(rank: int, number: int) -> None:
        begun.set()
        assert rank or end.wait(LIMIT_S)

    until(lambda: of.holds(0))
    cuda.broadcasting = hangs
    for _ in range(3):
        of.train()
        assert_ends(begun)  # with version 1
        # three tensors of the version on its way, and of the one that waits: others are left out
        until(lambda: sum(copy() is not None for copy in COPIES) <= 6)
    end.set()
    until(lambda: of.holds(3))
    of.assert_holds(3)
    assert {version for _, version in of.loads} == {0, 1, 3}
    until(lambda: sum(copy() is not None for copy in COPIES) == 3)  # for explorers that come late
    of.pusher.close()
    until(lambda: not any(copy() is not None for copy in COPIES))


def test_calls_and_their_order_beside_training(rule: Any, background: str, cuda: CUDA, training: Any) -> None:
    of = training(rule, background, e0=1, e1=1)
    until(lambda: of.holds(0))
    cuda.calls.clear()
    of.train()
    until(lambda: of.holds(1))
    here = threading.current_thread().name
    by_thread = {thread: list(calls) for thread, calls in by(cuda.calls, "thread").items()}
    sent = by_thread["weight-push"]
    assert {call.device for call in sent} == {DEVICE}
    assert {call.device for name in ("explorer-0-0", "explorer-1-0") for call in by_thread[name]} == {
        torch.device("cpu:0")
    }
    assert by_thread.keys() <= {"weight-push", "explorer-0-0", "explorer-1-0", here}
    if background == "snapshot":
        (made,) = by_thread[here]
        assert (made.what, made.stream) == ("synchronize", of.stream)
        assert cuda.calls[0] is made  # before anything is sent
        assert "wait" not in {call.what for call in sent}  # for what training has queued since
    else:
        assert here not in by_thread
        assert {call.other for call in sent if call.what == "wait"} == {of.stream}
    kept = [call.what for call in sent if call.what in ("wait", "keep")]
    pushes = 1 if background == "blocking" and rule is rft.FullyAsynchronous else 2
    assert kept == (["keep"] if background == "snapshot" else ["wait", "keep"]) * 3 * pushes
    assert [call.what for call in sent if call.what == "synchronize"] == ["synchronize"] * 2 * pushes


def by(calls: Iterable[Any], field: str) -> dict[str, list[Any]]:
    order = sorted(calls, key=lambda call: getattr(call, field))
    return {key: list(group) for key, group in itertools.groupby(order, key=lambda call: getattr(call, field))}


def test_one_after_another_where_exploration_never_stops(background: str, cuda: CUDA, training: Any) -> None:
    of = training(rft.MultiExplorerAsynchronous, background, e0=1, e1=1)
    loading: list[list[int]] = []

    def looks(rank: int, number: int) -> None:
        if not rank:
            loading.append([index for index, member in of.schedule._explorers.items() if member.loading])

    until(lambda: of.holds(0))
    cuda.broadcasting = looks
    of.train()
    until(lambda: of.holds(1))
    assert loading
    assert {len(those) for those in loading} == {1}


def test_one_that_comes_late(rule: Any, background: str, cuda: CUDA, training: Any) -> None:
    """It gets what was pushed, or if training has to wait for it anyway, the newest there is."""
    of = training(rule, background, k=2, e0=1, e1=1)
    for pushes in (False, True, False):
        of.train(pushes)
    until(lambda: of.holds(2))
    of.to.add(2)
    of.tell(of.schedule.joined, 2)
    with torch.cuda.stream(of.stream):  # type: ignore[arg-type]
        of.pusher.push_late(of.schedule.version)  # as when the trainer waits
    until(lambda: 2 in dict(of.loads))
    version = dict(of.loads)[2]
    assert version == (2 if background == "snapshot" else 3)
    assert_holds(of.to.workers[2], version)
    of.train()
    until(lambda: of.holds(4))
    of.assert_holds(4)


def test_a_death_in_mid_push_costs_the_other_nothing(rule: Any, background: str, cuda: CUDA, training: Any) -> None:
    of = training(rule, background, e0=1, e1=1)
    until(lambda: of.holds(0))
    broadcasts = itertools.count()

    def dies(rank: int, number: int) -> None:
        if not rank and next(broadcasts) == 0:  # once: the next push may begin before this one's thread has ended
            of.to.remove(0)

    cuda.broadcasting = dies
    began = time.monotonic()
    of.train()
    until(lambda: of.holds(1))
    assert time.monotonic() - began < LIMIT_S / 2
    assert list(of.to.workers) == [1]
    assert_holds(of.to.workers[1], 1)
    assert of.to.ended == {}
    of.train()
    until(lambda: of.holds(2))


def test_a_missing_member_costs_one_deadline_beside_training(
    rule: Any, background: str, cuda: CUDA, training: Any
) -> None:
    began = time.monotonic()
    of = training(rule, background, timeout_s=1.0, absent0=1, e1=1)
    until(lambda: of.holds(0))
    assert 1.0 < time.monotonic() - began < 2.0 + LIMIT_S / 4
    assert list(of.to.ended) == [0]
    of.train()
    until(lambda: of.holds(1))
    of.assert_holds(1)


def test_how_to_push_is_one_of_two() -> None:
    with pytest.raises(ConfigurationError, match=r"background='later'\): use 'snapshot' or 'blocking'"):
        rft.CollectiveTransport(background="later")  # type: ignore[arg-type]


def assert_ends(event: threading.Event) -> None:
    assert event.wait(LIMIT_S)


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)
