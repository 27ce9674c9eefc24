"""The thread that sends an explorer's messages, so that a rank 0 that does not read holds nobody up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from lightning_rft.channel import Channel

__all__ = ["Outbox"]


class Outbox:
    """Sends messages in order; each waits as long as rank 0 lives, whose end is the end of this process.

    Args:
        channel: The line to rank 0, without a deadline of its own.
        failed: Called on the thread with what ended it.
    """

    def __init__(self, channel: Channel, failed: Callable[[Exception], object]) -> None:
        self._channel = channel
        self._failed = failed
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        """Has a message sent; it must not change any more."""
        self._messages.put(message)

    def close(self) -> None:
        """Returns when everything is sent."""
        self._messages.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                self._channel.send(message)
        except Exception as error:
            self._failed(error)
