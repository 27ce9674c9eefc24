"""The thread that listens to the explorers, the lock that it shares with the trainer's thread, and timed waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from lightning_rft.errors import DeadlineError
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.roster import Roster

__all__ = ["GRACE_S", "Listener"]

#: Seconds that an explorer, or the thread, may take to end.
GRACE_S = 30.0
_POLL_S = 0.2


class Listener:
    """Passes every message of the explorers to ``handle``, under the lock, and ends explorers that hang.

    An error on its thread reaches the trainer at its next call or wait; ``check_interrupt`` raises to end a wait.
    """

    def __init__(
        self,
        pool: ExplorerPool,
        roster: Roster,
        handle: Callable[[int, Any], None],
        check_interrupt: Callable[[], None],
    ) -> None:
        #: Held by a thread while it reads what the other one changes.
        self.lock = threading.Condition(threading.RLock())
        #: When the last message came, in seconds of :func:`time.monotonic`.
        self.heard = time.monotonic()
        self._pool = pool
        self._roster = roster
        self._handle = handle
        self._check_interrupt = check_interrupt
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="coordinator", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
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
        """Raises the error that ends the run, if there is one."""
        if self._error is not None:
            raise self._error
        self._check_interrupt()

    def failed(self, error: BaseException) -> None:
        """Ends every wait with this error, unless another came first."""
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
        """Waits until ``done``, which must have a deadline of its own if there is no ``timeout_s``.

        Both functions are called under the lock, ``show`` again and again to report progress. Raises
        :class:`DeadlineError` after ``timeout_s``, and the error that ends the run.
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
