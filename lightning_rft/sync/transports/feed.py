"""A passage from the thread that makes tensors to the one that sends them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from lightning_rft.sync.transports.transport import Named

__all__ = ["Feed"]


class Feed:
    """Hands over what ``source`` yields, one at a time and only as fast as it is taken.

    The thread that owns the source calls :meth:`fill`; another iterates.
    """

    def __init__(self, source: Iterator[Named]) -> None:
        self._source = source
        self._changed = threading.Condition()
        self._waiting: Named | None = None
        self._ended = False

    def fill(self, timeout_s: float) -> bool:
        """Hands over the next tensor if the last one is taken in time; whether there may be more."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting is None, timeout_s):
                return True
        item = next(self._source, None)
        if item is None:
            self.end()
            return False
        with self._changed:
            self._waiting = item
            self._changed.notify_all()
        return True

    def end(self) -> None:
        """Hands over no more; who iterates gets what is waiting, and then comes to the end."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Named]:
        while (item := self._take()) is not None:
            yield item

    def _take(self) -> Named | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._ended)
            item, self._waiting = self._waiting, None
            self._changed.notify_all()
            return item
