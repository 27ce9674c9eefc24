"""Pushes weights in the background, from a snapshot: neither training nor exploring waits for it."""

from __future__ import annotations

import threading
import time
from typing import Protocol

import torch

from lightning_rft.errors import DeadlineError
from lightning_rft.sync.transports.transport import Explorers, Transport, Weights

__all__ = ["Publisher", "snapshot"]


class Pushed(Protocol):
    """What the publisher asks of the run."""

    @property
    def explorers(self) -> Explorers:
        """Those whom weights are for."""
        ...

    def published(self, version: int) -> None:
        """Tells that a version can be loaded."""
        ...

    def failed(self, error: BaseException) -> None:
        """Tells what went wrong in the background."""
        ...

    def observe(self, track: str, what: str, began: float, version: int) -> None:
        """Records what took from ``began`` until now."""
        ...


class Publisher:
    """A thread that makes versions loadable and has explorers load them.

    A version that a newer one overtakes before its turn is left out: explorers want the newest.

    Args:
        transport: How weights travel.
        run: Where to reach explorers, and whom to tell.
    """

    def __init__(self, transport: Transport, run: Pushed) -> None:
        self._transport = transport
        self._run = run
        self._news = threading.Condition()
        self._next: tuple[Weights, int] | None = None
        self._current: tuple[Weights, int] | None = None
        self._loads: list[int] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, weights: Weights, version: int) -> None:
        """Takes over a :func:`snapshot`; returns at once."""
        with self._news:
            self._next = weights, version
            self._news.notify_all()

    def load(self, explorer: int) -> None:
        """Has an explorer load what is published last; returns at once."""
        with self._news:
            self._loads.append(explorer)
            self._news.notify_all()

    def close(self, timeout_s: float) -> None:
        """Ends the thread after what it is at.

        Raises:
            DeadlineError: It did not end in time.
        """
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeadlineError(f"a weight push in the background did not end within {timeout_s:g} s")

    def _work(self) -> None:
        try:
            while self._wait():
                self._step()
        except BaseException as error:
            self._run.failed(error)

    def _wait(self) -> bool:
        with self._news:
            self._news.wait_for(lambda: self._closing or self._next is not None or self._loads)
            return not self._closing

    def _step(self) -> None:
        with self._news:
            new, self._next = self._next, None
        if new is not None:
            weights, version = new
            began = time.monotonic()
            self._transport.prepare(weights, version, self._run.explorers)
            if self._transport.kind == "checkpoint":
                self._run.observe("trainer", "write checkpoint", began, version)
            self._current = new
            self._run.published(version)
            return
        assert self._current is not None, "a load before the first version"
        weights, version = self._current
        with self._news:
            count = 1 if self._transport.one_by_one else len(self._loads)
            explorers, self._loads = self._loads[:count], self._loads[count:]
        self._transport.push(weights, version, self._run.explorers, explorers)


def snapshot(weights: Weights, dtype: str) -> Weights:
    """Copies weights to the CPU, in the engines' dtype; tensors that share memory still do.

    Example:
        >>> tied = torch.ones(2)
        >>> copies = snapshot([("embedding", tied), ("head", tied)], "float32")
        >>> copies[0][1] is copies[1][1], copies[0][1] is tied
        (True, False)
    """
    target: torch.dtype = getattr(torch, dtype)
    copies: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    taken = []
    for name, tensor in weights:
        place = tensor.data_ptr(), tuple(tensor.shape)
        if place not in copies:
            kind = target if tensor.is_floating_point() else tensor.dtype
            copies[place] = tensor.detach().to("cpu", kind, copy=True)
        taken.append((name, copies[place]))
    return taken
