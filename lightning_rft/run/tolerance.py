"""How many samples may fail: some rewards call other machines, and a few errors must not end a run of hours."""

from __future__ import annotations

import logging
from collections import deque

from lightning_rft.channel import Failure
from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.messages import Explored

__all__ = ["Tolerance"]

_log = logging.getLogger(__name__)


class Tolerance:
    """Counts samples that failed, and ends the run when too many of the latest did.

    Args:
        max_error_rate: Share of failed samples, above 0 and at most 1, that is still tolerated.
        window: How many samples are looked at. Until there are as many, the missing ones count as good: otherwise the
            very first failure would be a rate of 1.

    Raises:
        ConfigurationError: ``max_error_rate`` is out of range.
    """

    def __init__(self, max_error_rate: float, window: int) -> None:
        if not 0 < max_error_rate <= 1:
            raise ConfigurationError(f"max_error_rate={max_error_rate} must be above 0 and at most 1")
        self.max_error_rate = max_error_rate
        #: Samples that failed after every retry, and how often one was tried again.
        self.failed = self.retried = 0
        self._window = window
        self._latest: deque[tuple[int, int]] = deque()  # samples and failures of each group
        self._samples = self._failures = 0  # of the latest
        self._first: Failure | None = None

    def take(self, explored: Explored, where: str) -> None:
        """Takes in how a group went.

        Args:
            explored: The explorer's message.
            where: Which explorer, for the traceback.

        Raises:
            Exception: The first error of all, if too many samples failed; or one that trying again would not change.
        """
        self.failed += len(explored.failures)
        self.retried += explored.retried
        for failure in explored.failures:
            if failure.permanent:
                raise failure.unpack(where)
            if self._first is None:
                self._first = failure
                _log.warning("a sample of task %r failed after every retry:\n%s", explored.task_id, failure.text)
        self._latest.append((len(explored.experiences) + len(explored.failures), len(explored.failures)))
        self._samples += self._latest[-1][0]
        self._failures += self._latest[-1][1]
        while self._samples - self._latest[0][0] >= self._window:
            samples, failures = self._latest.popleft()
            self._samples -= samples
            self._failures -= failures
        if self._first is not None and self._failures > self.max_error_rate * max(self._window, self._samples):
            raise self._first.unpack(f"{where}; above max_error_rate={self.max_error_rate:g} by now")
