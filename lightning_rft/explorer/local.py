"""An explorer's process on this machine: how it is started, spoken to and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning_rft.channel import spawn

__all__ = ["GRACE_S", "LocalProcess", "end_all"]

#: Seconds that a process may take to end once it was told to, and then to be gone once it was killed.
GRACE_S = 3.0
_LOG_LINES = 20


class LocalProcess:
    """Starts the process, in a session of its own so that everything it starts can be ended with it.

    Args:
        environment: Variables to add to this process's own.
        log: File that takes its output.
    """

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._process, self.channel = spawn(
            "lightning_rft.explorer.worker.main", environment=environment, log=log, own_session=True
        )

    @property
    def pid(self) -> int:
        """Process id, which is that of its process group too."""
        return self._process.pid

    def send(self, message: Any) -> None:
        """Sends a message; raises :class:`OSError` if nobody reads it."""
        self.channel.send(message)

    def kill(self) -> None:
        """Kills the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def status(self, timeout_s: float) -> int | None:
        """Its exit status, waiting for it; ``None`` if it still runs after ``timeout_s``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self._process.returncode

    def log_tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])


def end_all(processes: Collection[LocalProcess], grace_s: float = GRACE_S) -> None:
    """Asks, waits, kills: every process and what it started is gone when this returns."""
    if grace_s > 0:
        for process in processes:
            with contextlib.suppress(OSError):
                process.send(None)
    deadline = time.monotonic() + grace_s
    for process in processes:
        process.status(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
        process.status(GRACE_S)
        process.channel.close()
