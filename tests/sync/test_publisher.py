"""Pushes in the background: the newest goes first, errors are told, and a hanging one keeps nobody from ending."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

import lightning_rft as rft
from lightning_rft.errors import DeadlineError
from lightning_rft.run.pusher import Publisher
from lightning_rft.sync.transports.transport import Transport


class Run:
    explorers = None

    def __init__(self) -> None:
        self.done: list[tuple[str, Any]] = []
        self.news = threading.Event()

    def published(self, version: int) -> None:
        self.done.append(("published", version))
        self.news.set()

    def failed(self, error: BaseException) -> None:
        self.done.append(("failed", error))
        self.news.set()

    def observe(self, *_: Any) -> None:
        pass


class Slow(Transport):
    """Prepares one version when it is let, and fails with version 9."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def prepare(self, weights: Any, version: int, explorers: Any) -> None:
        self.begun.set()
        assert self.go_on.wait(30)
        if version == 9:
            raise rft.TransportError("the disk is full")

    def push(self, weights: Any, version: int, explorers: Any, to: Any = None) -> None:
        pass


def test_what_a_newer_version_overtakes_is_left_out_and_errors_are_told() -> None:
    run, transport = Run(), Slow()
    publisher = Publisher(transport, run)  # type: ignore[arg-type]
    publisher.publish([], 1)
    assert transport.begun.wait(30)
    publisher.publish([], 2)
    publisher.publish([], 9)
    transport.go_on.set()
    publisher._thread.join(30)  # an error ends it
    assert run.done[0] == ("published", 1)
    assert isinstance(run.done[1][1], rft.TransportError)
    publisher.close(1.0)


def test_one_that_hangs_does_not_hide_the_error_that_ended_the_run() -> None:
    run, transport = Run(), Slow()
    transport.timeout_s = 0.1
    strategy = rft.FullyAsynchronous(transport=transport)
    strategy._run = run  # type: ignore[assignment]
    strategy._publisher = publisher = Publisher(transport, run)  # type: ignore[arg-type]
    publisher.publish([], 1)
    assert transport.begun.wait(30)
    with pytest.raises(DeadlineError, match="did not end within"):
        publisher.close(0.1)
    error = ZeroDivisionError()
    strategy.on_exception(SimpleNamespace(), SimpleNamespace(), error)  # type: ignore[arg-type]
    assert run.done[0] == ("failed", error)
    assert strategy._publisher is None
    transport.go_on.set()
    publisher._thread.join(30)
    assert not publisher._thread.is_alive()
