"""The thread that listens to the explorers, the lock that it shares with the trainer's thread, and timed waits."""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_rft.errors import DeadlineError
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.roster import Roster

__all__ = ["GRACE_S", "Listener"]

#: Seconds that an explorer, or the thread, may take to end.
GRACE_S = 30.0
_POLL_S = 0.2
_AWAY_S = 2.0  # for which the thread may hear nothing before explorers are excused


class Listener:
    """Passes every message of the explorers to ``handle``, and ends explorers that hang.

    An error on its thread reaches the trainer at its next call or wait; ``check_interrupt`` raises to end a wait.
    ``handle`` takes the lock where it needs it, and runs the user's own functions without it.
    """

    def __init__(
        self,
        pool: ExplorerPool,
        roster: Roster,
        handle: Callable[[int, Any], None],
        check_interrupt: Callable[[], None],
    ) -> None:
        #: When the last message came, in seconds of :func:`time.monotonic`.
        self.heard = time.monotonic()
        self._pool = pool
        self._roster = roster
        self._handle = handle
        self._check_interrupt = check_interrupt
        self._lock = threading.RLock()
        self._news = threading.Condition()
        self._told = 0  # counts the news, so that none is missed between a look and a wait
        self._busy_since = math.inf  # when it began with the message that it is at
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closing.is_set()

    def close(self) -> None:
        """Ends the thread, which might just be starting an explorer again, but not a function of the user's in it."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_AWAY_S)
            if math.isinf(self._busy_since):
                self._thread.join(GRACE_S)

    def raise_failures(self) -> None:
        """Raises the error that ends the run, if there is one.

        Raises:
            DeadlineError: The thread has been at one message for ``Timeouts.progress_s``; with the line that it is in.
        """
        if self._error is not None:
            raise self._error
        self._check_interrupt()
        if time.monotonic() - self._busy_since > self._roster.timeout_s:
            raise DeadlineError(
                f"rank 0 was busy for Timeouts(progress_s={self._roster.timeout_s:g}) with a single message of an "
                f"explorer, so that nobody listened to the others: make this quicker, or raise the setting\n"
                f"{self._line()}"
            )

    def failed(self, error: BaseException) -> None:
        """Ends every wait with this error, unless another came first."""
        self._error = self._error or error
        self.tell()

    def tell(self) -> None:
        """Has those who wait look again."""
        with self._news:
            self._told += 1
            self._news.notify_all()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock that guards what both threads change; raises as :meth:`raise_failures` while it waits."""
        while not self._lock.acquire(timeout=_POLL_S):
            self.raise_failures()
        try:
            yield
        finally:
            self._lock.release()

    def _line(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame)[-3:])

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
        while True:
            told = self._told
            with self.locked():
                if done():
                    break
                show()
            self.raise_failures()
            self._wait_for_news(told)
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise DeadlineError(f"waited {timeout_s:.0f} s for {what}: see the explorers' logs")
        self.raise_failures()

    def _wait_for_news(self, told: int) -> None:
        with self._news:
            self._news.wait_for(lambda: self._told != told, _POLL_S)

    def _listen(self) -> None:
        try:
            listened = time.monotonic()
            while not self._closing.is_set():
                messages = self._pool.poll(_POLL_S)
                now = time.monotonic()
                if now - listened > _AWAY_S:  # rank 0 was stopped, or busy: nobody heard what explorers had to say
                    self._roster.excuse(now - listened)
                listened = now
                for explorer, message in messages:
                    self._busy_since = time.monotonic()
                    self._handle(explorer, message)
                self._busy_since = math.inf
                if messages or self._pool.starting:
                    self.heard = now
                    self.tell()
                with self.locked():
                    hung = {explorer: self._roster.owed(explorer) for explorer in self._roster.overdue(now)}
                for explorer, owed in hung.items():
                    self._pool.kill(
                        explorer,
                        f"had work but made no progress for Timeouts(progress_s={self._roster.timeout_s:g}): {owed}",
                    )
        except BaseException as error:
            self.failed(error)
