"""An explorer's process on this machine: its start, its channel, its end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from lightning_rft.channel import spawn
from lightning_rft.explorer.log_tail import log_tail

__all__ = ["GRACE_S", "LocalProcess", "end_all"]

_log = logging.getLogger(__name__)

#: Seconds that a process may take to end when asked, and then to be gone when killed.
GRACE_S = 3.0


class LocalProcess:
    """A process in a session of its own, so that all it starts can be ended with it; ``log`` takes its output."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._process, self.channel = spawn(
            "lightning_rft.explorer.worker.main", environment=environment, log=log, own_session=True
        )

    @property
    def pid(self) -> int:
        """Process id, which is also that of its process group."""
        return self._process.pid

    def kill(self) -> None:
        """Kills the process and everything it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter on macOS, of one that has ended
            os.killpg(self.pid, signal.SIGKILL)

    def status(self, timeout_s: float) -> int | None:
        """Waits for the exit status; ``None`` if the process still runs after ``timeout_s``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self._process.returncode

    def log_tail(self) -> str:
        """Last lines of the log."""
        return log_tail(self.log)


def end_all(processes: Collection[LocalProcess], grace_s: float = GRACE_S) -> None:
    """Asks, waits, kills: processes and everything they started; waits no longer for one that the kernel holds."""
    if grace_s > 0:
        for process in processes:
            with contextlib.suppress(OSError):
                process.channel.send(None)
        _wait(processes, grace_s)
    for process in processes:
        process.kill()
    _wait(processes, GRACE_S)
    for process in processes:
        if process.status(0) is None:
            _log.warning(
                "Process %d was killed and is not gone %g s later: a device or disk may hold it. See %s.",
                *(process.pid, GRACE_S, process.log),
            )
        process.channel.close()


def _wait(processes: Collection[LocalProcess], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.status(max(0.0, deadline - time.monotonic()))
