"""The share of samples that fail: some rewards call other machines, and a few errors must not end a run of hours."""

from __future__ import annotations

import logging
from collections import deque

from lightning_rft.channel import Failure
from lightning_rft.explorer.messages import Explored

__all__ = ["ErrorRate"]

_log = logging.getLogger(__name__)


class ErrorRate:
    """Counts samples that failed, and ends the run when too many of the latest did.

    ``maximum`` is the share that is tolerated, ``window`` how many samples are looked at. Until there are as many, the
    missing ones count as good: otherwise the very first failure would be a rate of 1.
    """

    def __init__(self, maximum: float, window: int) -> None:
        #: Samples that failed after every retry, and how often one was tried again.
        self.failed = self.retried = 0
        self._maximum = maximum
        self._window = window
        self._latest: deque[tuple[int, int]] = deque()  # samples and failures of each group
        self._samples = self._failures = 0  # of the latest
        self._first: Failure | None = None
        self._shown: set[str] = set()  # by where they were raised

    def take(self, explored: Explored, where: str) -> None:
        """Takes in how a group went on an explorer, and shows each kind of failure once.

        Raises the first failure of all if there are too many.
        """
        self.failed += len(explored.failures)
        self.retried += explored.retried
        for failure in explored.failures:
            self._first = self._first or failure
            if failure.place not in self._shown:
                self._shown.add(failure.place)
                _log.warning("a sample of task %r failed after every retry:\n%s", explored.task_id, failure.text)
        self._latest.append((len(explored.experiences) + len(explored.failures), len(explored.failures)))
        self._samples += self._latest[-1][0]
        self._failures += self._latest[-1][1]
        while self._samples - self._latest[0][0] >= self._window:
            samples, failures = self._latest.popleft()
            self._samples -= samples
            self._failures -= failures
        if self._first is not None and self._failures > self._maximum * max(self._window, self._samples):
            raise self._first.unpack(f"{where}; above Tolerance(max_error_rate={self._maximum:g}) by now")

    def metrics(self) -> dict[str, float]:
        """How many samples failed, and how often one was tried again, so far."""
        return {"rft/failed_samples": float(self.failed), "rft/retried_samples": float(self.retried)}
