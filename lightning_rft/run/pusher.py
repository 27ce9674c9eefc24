"""Weight pushes: at once, in the background, or to explorers that came up between two pushes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Set
from itertools import islice
from typing import Any

import torch

from lightning_rft.errors import DeadlineError
from lightning_rft.explorer.receivers import Receivers
from lightning_rft.explorer.roster import Roster
from lightning_rft.sync.transports.transport import Named, Transport, Weights
from lightning_rft.trainer.scoring import Announcement, Scores

__all__ = ["Background", "Pusher"]

_SAMPLED_ELEMENTS = 100_000


class Pusher:
    """Brings the policy's weights to the explorers of one run, in the ``background`` unless the transport blocks.

    ``gathered`` begins to gather the policy's ``"weights"`` in a dtype, on the trainer's thread: it yields an
    :class:`~lightning_rft.trainer.scoring.Announcement`, and then one tensor after another; or it yields the policy's
    ``"scores"``. ``expect`` gets a version and its scores, while explorers load it or explore with it. ``pushed`` gets
    the version once it is pushed, or can be loaded; ``failed`` an error in the background; ``observe`` track, label,
    begin and version for the timeline.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        background: bool,
        roster: Roster,
        receivers: Receivers,
        gathered: Callable[[str, str], Iterator[Any]],
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
        self._before: torch.Tensor | None = None  # of the one before
        self._scored = -1  # the latest version that was
        self._as_asked = background and transport.blocking
        self._background: Background | None = None
        if background and not transport.blocking:
            self._background = Background(transport, receivers, pushed, failed, observe)

    def push(self, version: int) -> None:
        """Pushes the policy's weights, or hands a copy of them to the background; then scores what proves the push."""
        self.version = version
        began = time.monotonic()
        self._before = self._sample
        taken, trained = self._take()
        weights = Weights(taken.manifest, taken.device, lambda: self._sampled(taken, trained))
        if self._background is not None:
            self._background.overtake()
            self._background.push(self._transport.snapshot(weights, self._receivers), version)
        elif self._as_asked:
            self._push_as_asked(weights, version)
            self._observe("trainer", self._transport.push_label, began, version)
        else:
            self._transport.push(weights, version, self._receivers)
            self._observe("trainer", self._transport.push_label, began, version)
            self._pushed(version)
        self._score(version)

    def _push_as_asked(self, weights: Weights, version: int) -> None:
        """Pushes to all explorers that may load now, in the order in which the schedule has them load.

        The others load when the trainer next waits or is between two steps.
        """
        self._pushed(version)
        while late := self._receivers.late():
            self._transport.push(weights, version, self._receivers, late)
        if self._sample is self._before:  # nobody has taken the weights yet
            for _ in weights.tensors():
                pass

    def load(self, *explorers: int) -> None:
        """Has explorers load the newest version, together, without waiting for them.

        If pushes are not in the background, they get weights when the trainer next waits.
        """
        if self._background is not None:
            self._background.load(*explorers)
        else:
            self._roster.want_weights(*explorers)

    def push_late(self, version: int) -> None:
        """Pushes the policy's weights to the explorers, if any, that want them and are not loading."""
        if late := self._receivers.late():
            began = time.monotonic()
            self._transport.push(self._take()[0], version, self._receivers, late)
            self._observe("trainer", self._transport.push_label, began, version)
            self._score(version)  # which may lie between two that are pushed to all

    def _score(self, version: int) -> None:
        """Scores what explorers do, which have something else to do meanwhile: once it is pushed, and before a step."""
        if version > self._scored:
            self._scored = version
            self._expect(version, next(self._gathered("scores", self._receivers.dtype)))

    def _take(self) -> tuple[Weights, Set[str] | None]:
        """The weights, and the names of those that training changes if not all."""
        dtype = self._receivers.dtype
        begun = [self._gathered("weights", dtype)]
        announced: Announcement = next(begun[0])
        self._receivers.text_ids = announced.text_ids

        def tensors() -> Iterator[Named]:
            return begun.pop() if begun else islice(self._gathered("weights", dtype), 1, None)

        return Weights(announced.manifest, announced.device, tensors), announced.trained

    def wait_loaded(self) -> None:
        """Waits until every explorer has loaded what was pushed in the background."""
        if self._background is not None:
            explorers = list(self._receivers.members())
            timeout_s = 2 * self._transport.timeout_s * max(1, len(explorers))
            late = self._receivers.wait_loaded(self.version, explorers, timeout_s)
            self._transport.end_late(late, f"load version {self.version}", self._receivers)

    def share_changed(self) -> float:
        """The share of about 100,000 evenly spaced trained elements that the last push changed, in the engines' dtype.

        Small updates vanish in bfloat16: near 0, explorers see the same policy as before. For the first push it is 1.
        """
        before, now = self._before, self._sample
        if before is None or now is None or before.shape != now.shape or before.dtype != now.dtype:
            return 1.0
        return float((before != now).float().mean())

    def _sampled(self, weights: Weights, trained: Set[str] | None) -> Iterator[Named]:
        """Yields weights, and takes a sample of those that are trained as they pass."""
        own = [info for info in weights.manifest if info.same_as is None and (trained is None or info.name in trained)]
        names = {info.name for info in own}
        stride = max(1, sum(math.prod(info.shape) for info in own) // _SAMPLED_ELEMENTS)
        dtype: torch.dtype = getattr(torch, self._receivers.dtype)
        parts = []
        for name, tensor in weights.tensors():
            if name in names:
                parts.append(tensor.reshape(-1)[::stride].to("cpu", dtype))
                if len(parts) == len(own):  # before it is handed on: nobody need ask for more than there is
                    self._sample = torch.cat(parts)
            yield name, tensor

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
        """Queues a copy of the weights."""
        with self._news:
            self._next = weights, version
            self._news.notify_all()

    def overtake(self) -> None:
        """Drops the version that waits, if any, since a newer one will follow: its copy takes memory."""
        with self._news:
            self._next = None

    def load(self, *explorers: int) -> None:
        """Queues the loads of explorers, which begin together unless the transport serves one at a time."""
        with self._news:
            self._loads += explorers
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
            count = 0 if new is not None else 1 if self._transport.one_by_one else len(self._loads)
            explorers, self._loads = self._loads[:count], self._loads[count:]
        if new is not None:
            weights, version = new
            began = time.monotonic()
            if self._transport.prepare(weights, version, self._receivers):
                self._observe("trainer", self._transport.push_label, began, version)
            self._current = new
            self._pushed(version)
            return
        if not explorers:  # what it was woken for was overtaken
            return
        assert self._current is not None, "a load before the first version"
        weights, version = self._current
        self._transport.push(weights, version, self._receivers, explorers)
