"""Pushes in the background: the newest goes first, errors are told, and a hanging one keeps nobody from ending."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft
from lightning_rft.errors import DeadlineError
from lightning_rft.run.pusher import Background, Pusher
from lightning_rft.sync.transports.transport import Transport, Weights
from lightning_rft.trainer.scoring import Announcement, Scores
from tests.processes import until
from tests.trainer_and_data import fake_data, pool_of, quiet_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Told:
    """What the background tells the run."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def background(self, transport: Transport) -> Background:
        return Background(transport, None, self.done.append, self.done.append, lambda *_: None)


class Slow(Transport):
    """Prepares one version when it is let, and fails with version 9."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def prepare(self, weights: Any, version: int, explorers: Any) -> bool:
        self.begun.set()
        assert self.go_on.wait(30)
        if version == 9:
            raise rft.TransportError("the disk is full")
        return True

    def push(self, weights: Any, version: int, explorers: Any, to: Any = None) -> None:
        pass


def test_what_a_newer_version_overtakes_is_left_out_and_errors_are_told() -> None:
    told, transport = Told(), Slow()
    background = told.background(transport)
    background.push([], 1)
    assert transport.begun.wait(30)
    background.push([], 2)
    background.push([], 9)
    transport.go_on.set()
    background._thread.join(30)  # an error ends it
    assert told.done[0] == 1
    assert isinstance(told.done[1], rft.TransportError)
    background.close(1.0)


def test_nobody_is_pushed_to_when_what_waited_was_overtaken() -> None:
    """The thread may wake for a version, and find it gone."""
    told, pushed = Told(), []
    transport = Slow()
    transport.go_on.set()
    transport.push = lambda weights, version, explorers, to=None: pushed.append(to)  # type: ignore[method-assign]
    background = told.background(transport)
    background.push([], 1)
    until(lambda: told.done == [1], "the first version")
    background._step()
    background.close(30.0)
    assert pushed == []


def test_a_push_that_hangs_is_told_of() -> None:
    told, transport = Told(), Slow()
    background = told.background(transport)
    background.push([], 1)
    assert transport.begun.wait(30)
    with pytest.raises(DeadlineError, match="did not end within"):
        background.close(0.1)
    transport.go_on.set()
    background._thread.join(30)
    assert not background._thread.is_alive()


class Counts(Transport):
    """Notes to whom it pushes."""

    def __init__(self, one_by_one: bool) -> None:
        self.one_by_one = one_by_one
        self.pushes: list[list[int]] = []
        self.all_loaded = threading.Event()

    def push(self, weights: Any, version: int, explorers: Any, to: Any = None) -> None:
        self.pushes.append(list(to))
        if 5 in to:
            self.all_loaded.set()


@pytest.mark.parametrize(("one_by_one", "pushes"), [(False, [[3, 4, 5]]), (True, [[3], [4], [5]])])
def test_explorers_whose_turn_it_is_load_in_one_push_if_the_transport_can(
    one_by_one: bool, pushes: list[list[int]]
) -> None:
    told, transport = Told(), Counts(one_by_one)
    background = told.background(transport)
    background.push([], 1)
    background.load(3, 4, 5)
    assert transport.all_loaded.wait(30)
    background.close(30)
    assert transport.pushes == pushes


class Hangs(rft.CheckpointTransport):
    """Writes the first version, and hangs with the next."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def prepare(self, weights: Any, version: int, explorers: Any) -> bool:
        if version > 0:
            self.begun.set()
            assert self.go_on.wait(60)
        return super().prepare(weights, version, explorers)


def test_a_push_that_hangs_does_not_hide_the_error_that_ended_the_run(tiny_model_path: Path, tmp_path: Path) -> None:
    transport = Hangs()

    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                assert transport.begun.wait(30)
                transport.timeout_s = 0.1  # which is for how long the end of the run waits for the push
                raise ZeroDivisionError("of the user's callback")

    data = fake_data(tasks=["1 + 1 =", "1 + 2 ="], tasks_per_step=1, max_new_tokens=4)
    trainer = quiet_trainer(tmp_path, rft.FullyAsynchronous(transport=transport), Fails(), max_steps=3)
    with pytest.raises(ZeroDivisionError, match="of the user's callback"):
        trainer.fit(rft.RFTModule(tiny_model_path), data)
    assert not pool_of(data).running
    transport.go_on.set()


class BreaksOff(Transport):
    """Takes the first tensor alone, and then begins anew and takes all."""

    def __init__(self) -> None:
        self.taken: list[dict[str, torch.Tensor]] = []

    def push(self, weights: Weights, version: int, explorers: Any, to: Any = None) -> None:
        next(weights.tensors())
        self.taken.append(dict(weights.tensors()))


class Policy:
    """Weights of which a push may change some, one of them tied."""

    def __init__(self) -> None:
        self.weights = {"w": torch.ones(900), "v": torch.ones(100)}
        self.weights["alias"] = self.weights["w"]
        self.begun: list[str] = []

    def gathered(self, what: str, dtype: str) -> Iterator[Any]:
        self.begun.append(f"{what} in {dtype}")
        if what == "scores":
            yield Scores((1, 2), (-1.0,), 1.0, "float32")
            return
        weights = Weights.of(list(self.weights.items()), dtype)
        yield Announcement(list(weights.manifest), weights.device, (1, 2))
        yield from weights.tensors()

    def train(self) -> None:
        self.weights["w"][:10], self.weights["v"][:] = 2.0, 1.0001  # the second is 1 in bfloat16

    def pusher(self, transport: Transport, told: list[int], *, background: bool, late: Any = None) -> Pusher:
        nothing = lambda *_: None  # noqa: E731
        return Pusher(
            transport, background=background, roster=nothing,  # type: ignore[arg-type]
            receivers=SimpleNamespace(dtype="bfloat16", late=late),  # type: ignore[arg-type]
            gathered=self.gathered, expect=nothing, pushed=told.append, failed=nothing, observe=nothing,
        )  # fmt: skip


def test_a_push_that_is_repeated_gathers_again_and_knows_what_changed_since_the_last() -> None:
    policy, transport = Policy(), BreaksOff()
    pusher = policy.pusher(transport, [], background=False)
    pusher.push(0)
    assert pusher.share_changed() == 1.0
    policy.train()
    pusher.push(1)
    assert pusher.share_changed() == pytest.approx(0.01)
    assert [list(taken) for taken in transport.taken] == [["w", "v"]] * 2
    assert policy.begun == ["weights in bfloat16", "weights in bfloat16", "scores in bfloat16"] * 2


@pytest.mark.parametrize("background", [False, True])
def test_the_trainer_scores_while_explorers_have_something_to_do(background: bool) -> None:
    """And at once: the next step changes what it would score."""
    order: list[str] = []

    class Noted(Transport):
        def push(self, weights: Weights, version: int, explorers: Any, to: Any = None) -> None:
            order.extend(f"sent {name}" for name, _ in weights.tensors())

    policy = Policy()
    pusher = policy.pusher(Noted(), [], background=background)
    pusher._expect = lambda version, scores: order.append(f"scored {version}")
    pusher.push(5)
    assert order == (["scored 5"] if background else ["sent w", "sent v", "scored 5"])
    assert policy.begun == ["weights in bfloat16", "scores in bfloat16"]
    pusher.close()


def test_a_version_between_two_pushes_is_scored_once() -> None:
    """An explorer that comes up gets the policy as it is."""
    scored: list[int] = []
    policy = Policy()
    pusher = policy.pusher(BreaksOff(), [], background=False, late=lambda: [0])
    pusher._expect = lambda version, scores: scored.append(version)
    pusher.push(4)
    for version in (4, 6, 6):
        pusher.push_late(version)
    pusher.push(8)
    assert scored == [4, 6, 8]


def test_explorers_that_may_load_only_later_ask_then_and_what_changed_is_known_now() -> None:
    class Blocking(BreaksOff):
        blocking = True

    asked: list[list[int]] = [[], [0], [1], [], [1], []]
    policy, transport, told = Policy(), Blocking(), list[int]()
    pusher = policy.pusher(transport, told, background=True, late=lambda: asked.pop(0))
    pusher.push(0)  # nobody may load
    assert told == [0]
    assert transport.taken == []
    policy.train()
    pusher.push(1)  # one after another
    assert told == [0, 1]
    assert pusher.share_changed() == pytest.approx(0.01)
    assert len(transport.taken) == 2
    pusher.push_late(1)
    pusher.push_late(1)
    assert len(transport.taken) == 2 + 1
    assert told == [0, 1]
    assert not asked


def test_a_copy_that_waits_makes_room_for_the_next_one() -> None:
    told, transport = Told(), Slow()
    background = told.background(transport)
    background.push([], 1)
    assert transport.begun.wait(30)
    background.push([], 2)
    background.overtake()
    assert background._next is None
    transport.go_on.set()
    background.close(30.0)
    assert told.done == [1]
