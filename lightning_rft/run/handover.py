"""How GPUs that trainer and explorers share change hands, on the trainer's thread.

One side gives its memory back before the other takes it. For a training step:

    explorers are idle → Sleep to each → all have answered → optimizer back on the GPUs → step

and for a push, or to explore with the weights that were loaded before:

    optimizer in the CPU's memory → Wake(weights) to each → push → each wakes the rest → explore
    optimizer in the CPU's memory → Wake(weights, kv_cache) to each → explore
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from lightning_rft.explorer.engines.sleeping import DROPS, KEEPS, PARTS, WEIGHTS
from lightning_rft.explorer.receivers import Receivers
from lightning_rft.run.dispatcher import Dispatcher
from lightning_rft.run.pusher import Pusher
from lightning_rft.trainer.offload import Turn

__all__ = ["Handover"]


class Handover:
    """Hands GPUs from explorers to trainer and back; where they are not ``shared``, it does nothing.

    ``together`` has all of the trainer's ranks take a turn. Explorers that do not sleep or wake within ``timeout_s``
    are ended, and others are started for them in the explorers' next turn.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        pusher: Pusher,
        receivers: Receivers,
        *,
        together: Callable[..., Iterator[Any]],
        shared: bool,
        timeout_s: float,
    ) -> None:
        self._dispatcher = dispatcher
        self._pusher = pusher
        self._receivers = receivers
        self._together = together
        self._shared = shared
        self._timeout_s = timeout_s

    @property
    def idle(self) -> bool:
        """Whether explorers may be put to sleep, since nothing is left for them to do; under the lock."""
        dispatcher = self._dispatcher
        return not self._shared or dispatcher.turns.trains or (dispatcher.schedule.idle and not dispatcher.roster.work)

    def to_trainer(self, batch: int) -> None:
        """Puts all explorers to sleep, which are idle, and then has the trainer take its memory, to train a batch."""
        dispatcher, pool = self._dispatcher, self._dispatcher.pool
        if not self._shared or dispatcher.turns.trains:
            return
        pool.hold(True)
        dispatcher.listener.wait(lambda: not pool.coming_up, "explorers to start")  # for which the pool has a deadline
        # Where no push follows, validation may ask for the same weights once more.
        level = DROPS if dispatcher.schedule.rule.pushes_after(batch) else KEEPS
        with dispatcher.listener.locked():
            dispatcher.schedule.paused = True
            dispatcher.turn(dispatcher.turns.trainer(level))
        self._settle("fall asleep", lambda: dispatcher.turns.asleep(list(pool.up)))
        self._take(Turn.TRAINER)

    def to_explorers(self, *, pushes: bool = False) -> None:
        """Has the trainer give its memory back, and explorers wake: their weights alone if it ``pushes`` next.

        After the push they get no work until this is called once more.
        """
        dispatcher = self._dispatcher
        if not self._shared:
            return
        if dispatcher.turns.trains is not False:
            self._take(Turn.EXPLORERS, within_batch=dispatcher.groups.leased is not None)
        with dispatcher.listener.locked():
            dispatcher.turn(dispatcher.turns.explorers(WEIGHTS if pushes else PARTS))
            dispatcher.pool.hold(False)
        self._settle("wake", lambda: not dispatcher.turns.late)
        if pushes:
            return
        with dispatcher.listener.locked():
            dispatcher.roster.wants_weights()
        self._pusher.push_late(dispatcher.schedule.version)
        dispatcher.tell(dispatcher.schedule.resume)

    def _take(self, turn: Turn, within_batch: bool = False) -> None:
        for _ in self._together(turn, within_batch):
            pass

    def _settle(self, what: str, done: Callable[[], bool]) -> None:
        """Waits for explorers to do what they were told, and ends those that do not."""
        listener, turns = self._dispatcher.listener, self._dispatcher.turns
        while True:
            deadline = time.monotonic() + self._timeout_s
            listener.wait(lambda: done() or time.monotonic() > deadline, f"explorers to {what}")  # noqa: B023
            if done():
                return
            self._receivers.end(turns.late, f"did not {what} within Timeouts(sleep_s={self._timeout_s:g})")
