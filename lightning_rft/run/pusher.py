"""Weight pushes: at once, in the background, or to explorers that came up between two pushes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_rft.errors import DeadlineError
from lightning_rft.explorer.receivers import Receivers
from lightning_rft.explorer.roster import Roster
from lightning_rft.sync.transports.transport import Transport, Weights
from lightning_rft.trainer.scoring import Scores

__all__ = ["Background", "Pusher", "snapshot"]

_SAMPLED_ELEMENTS = 100_000


class Pusher:
    """Brings the policy's weights to the explorers of one run, in the ``background`` from a snapshot.

    ``gathered`` returns the policy's whole weights and its scores, on the trainer's thread; ``expect`` gets a version
    and its scores before the push. ``pushed`` gets the version once it is pushed, or can be loaded; ``failed`` an error
    in the background; ``observe`` track, label, begin and version for the timeline.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        background: bool,
        roster: Roster,
        receivers: Receivers,
        gathered: Callable[[], tuple[Weights, Scores]],
        expect: Callable[[int, Scores], None],
        pushed: Callable[[int], None],
        failed: Callable[[BaseException], None],
        observe: Callable[[str, str, float, int], None],
    ) -> None:
        #: The latest version whose weights were taken.
        self.version = -1
        self._transport = transport
        self._roster = roster
        self._receivers = receivers
        self._gathered = gathered
        self._expect = expect
        self._pushed = pushed
        self._observe = observe
        self._sample: torch.Tensor | None = None  # of the last push
        self._background = Background(transport, receivers, pushed, failed, observe) if background else None

    def push(self, version: int) -> Weights:
        """Pushes the policy's weights, or hands them to the background; returns them."""
        self.version = version
        began = time.monotonic()
        weights = self._take(version)
        if self._background is not None:
            self._background.push(snapshot(weights, self._receivers.dtype), version)
        else:
            self._transport.push(weights, version, self._receivers)
            self._observe("trainer", self._transport.push_label, began, version)
            self._pushed(version)
        return weights

    def load(self, explorer: int) -> None:
        """Has an explorer load the newest version, without waiting for it.

        If pushes are not in the background, it came up between two, and gets weights when the trainer next waits.
        """
        if self._background is not None:
            self._background.load(explorer)
        else:
            self._roster.want_weights(explorer)

    def push_alone(self, version: int, late: Sequence[int]) -> None:
        """Pushes the policy's weights to the explorers, if any, that came up between two pushes."""
        if late:
            began = time.monotonic()
            self._transport.push(self._take(version), version, self._receivers, sorted(late))
            self._observe("trainer", self._transport.push_label, began, version)

    def _take(self, version: int) -> Weights:
        weights, scores = self._gathered()
        self._expect(version, scores)
        self._receivers.text_ids = scores.ids
        return weights

    def wait_loaded(self) -> None:
        """Waits until every explorer has loaded what was pushed in the background."""
        if self._background is not None:
            explorers = list(self._receivers.members())
            timeout_s = 2 * self._transport.timeout_s * max(1, len(explorers))
            setting = f"{type(self._transport).__name__}(timeout_s=...)"
            self._receivers.wait_loaded(self.version, explorers, timeout_s, setting)

    def share_changed(self, weights: Weights) -> float:
        """The share of about 100,000 evenly spaced elements that changed since the last call, in the engines' dtype.

        Small updates vanish in bfloat16: near 0, explorers see the same policy as before. The first call returns 1.
        """
        stride = max(1, sum(tensor.numel() for _, tensor in weights) // _SAMPLED_ELEMENTS)
        dtype: torch.dtype = getattr(torch, self._receivers.dtype)
        now = torch.cat([tensor.detach().reshape(-1)[::stride].to("cpu", dtype) for _, tensor in weights])
        before, self._sample = self._sample, now
        if before is None or before.shape != now.shape or before.dtype != now.dtype:
            return 1.0
        return float((before != now).float().mean())

    def close(self) -> None:
        """Ends the background thread and closes the transport; safe to call twice."""
        background, self._background = self._background, None
        try:
            if background is not None:
                background.close(self._transport.timeout_s)
        finally:
            self._transport.close()


class Background:
    """A thread that makes versions loadable and has explorers load them; it skips all but the newest that waits."""

    def __init__(
        self,
        transport: Transport,
        receivers: Any,
        pushed: Callable[[int], None],
        failed: Callable[[BaseException], None],
        observe: Callable[[str, str, float, int], None],
    ) -> None:
        self._transport = transport
        self._receivers = receivers
        self._pushed = pushed
        self._failed = failed
        self._observe = observe
        self._news = threading.Condition()
        self._next: tuple[Weights, int] | None = None
        self._current: tuple[Weights, int] | None = None
        self._loads: list[int] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="pusher", daemon=True)
        self._thread.start()

    def push(self, weights: Weights, version: int) -> None:
        """Queues a :func:`snapshot`."""
        with self._news:
            self._next = weights, version
            self._news.notify_all()

    def load(self, explorer: int) -> None:
        """Queues the load of an explorer."""
        with self._news:
            self._loads.append(explorer)
            self._news.notify_all()

    def close(self, timeout_s: float) -> None:
        """Ends the thread after the current push; DeadlineError if that takes too long."""
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
            self._failed(error)

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
            if self._transport.prepare(weights, version, self._receivers):
                self._observe("trainer", self._transport.push_label, began, version)
            self._current = new
            self._pushed(version)
            return
        assert self._current is not None, "a load before the first version"
        weights, version = self._current
        with self._news:
            count = 1 if self._transport.one_by_one else len(self._loads)
            explorers, self._loads = self._loads[:count], self._loads[count:]
        self._transport.push(weights, version, self._receivers, explorers)


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
