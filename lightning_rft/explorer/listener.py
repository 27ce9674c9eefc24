"""The thread that listens to the explorers, the lock that it shares with the trainer's thread, and waits for news."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from lightning_rft.errors import DeadlineError
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.roster import Roster

__all__ = ["GRACE_S", "Listener"]

#: Seconds that an explorer or the thread may take to end.
GRACE_S = 30.0
_POLL_S = 0.2


class Listener:
    """Hands every message of the explorers to one function, and ends explorers that hang.

    An error on its thread reaches the trainer at its next call or wait.

    Args:
        pool: The explorers.
        roster: Knows which of them have work and get nowhere with it.
        handle: Called with explorer and message, under the lock.
        check_interrupt: Called during every wait; raises to end it.
    """

    def __init__(
        self,
        pool: ExplorerPool,
        roster: Roster,
        handle: Callable[[int, Any], None],
        check_interrupt: Callable[[], None],
    ) -> None:
        #: Held by whoever looks at what the other thread changes.
        self.lock = threading.Condition(threading.RLock())
        #: When there last was news, in seconds of :func:`time.monotonic`.
        self.heard = time.monotonic()
        self._pool = pool
        self._roster = roster
        self._handle = handle
        self._check_interrupt = check_interrupt
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="coordinator", daemon=True)

    def start(self) -> None:
        """Starts to listen."""
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closing.is_set()

    def close(self) -> None:
        """Ends the thread, which might just be starting an explorer again."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(GRACE_S)

    def raise_failures(self) -> None:
        """Raises what ends the run, if something does."""
        if self._error is not None:
            raise self._error
        self._check_interrupt()

    def failed(self, error: BaseException) -> None:
        """Ends every wait with what went wrong; the first error counts."""
        with self.lock:
            self._error = self._error or error
            self.lock.notify_all()

    def wait(
        self,
        done: Callable[[], bool],
        what: str,
        timeout_s: float | None = None,
        show: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits until ``done``, which itself sees to it that this happens in time unless ``timeout_s`` is given.

        Args:
            done: Ends the wait; called under the lock, and so is ``show``.
            what: What it is for, in the message of the error.
            timeout_s: Seconds that it may take.
            show: Called again and again, to show how far it is.

        Raises:
            DeadlineError: It did not happen within ``timeout_s``.
            Exception: Whatever ends the run.
        """
        began = time.monotonic()
        with self.lock:
            while not done():
                self.raise_failures()
                show()
                self.lock.wait(_POLL_S)
                if timeout_s is not None and time.monotonic() - began > timeout_s:
                    raise DeadlineError(f"waited {timeout_s:.0f} s for {what}: see the explorers' logs")
            self.raise_failures()

    def _listen(self) -> None:
        try:
            while not self._closing.is_set():
                messages = self._pool.poll(_POLL_S)
                now = time.monotonic()
                with self.lock:
                    for explorer, message in messages:
                        self._handle(explorer, message)
                    if messages or self._pool.starting:
                        self.heard = now
                        self.lock.notify_all()
                    hung = {explorer: self._roster.owed(explorer) for explorer in self._roster.overdue(now)}
                for explorer, owed in hung.items():
                    self._pool.kill(
                        explorer,
                        f"had work but made no progress for Timeouts(progress_s={self._roster.timeout_s:g}): {owed}",
                    )
        except BaseException as error:
            self.failed(error)
