"""Pushes in the background: the newest goes first, errors are told, and a hanging one keeps nobody from ending."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft
from lightning_rft.errors import DeadlineError
from lightning_rft.run.pusher import Background, Pusher
from lightning_rft.sync.transports.transport import Transport
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


def test_the_share_of_weights_that_a_push_changed() -> None:
    receivers = SimpleNamespace(dtype="bfloat16")
    nothing: Any = lambda *_: None  # noqa: E731
    pusher = Pusher(
        rft.CheckpointTransport(), background=False, roster=nothing, receivers=receivers,  # type: ignore[arg-type]
        gathered=nothing, expect=nothing, pushed=nothing, failed=nothing, observe=nothing,
    )  # fmt: skip
    weights = torch.ones(1000)
    assert pusher.share_changed([("w", weights)]) == 1.0
    weights[:10], weights[10:] = 2.0, 1.0001  # the second is 1 in bfloat16
    assert pusher.share_changed([("w", weights)]) == pytest.approx(0.01)
