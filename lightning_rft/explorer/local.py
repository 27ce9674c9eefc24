"""Explorers on this machine: processes of sessions of their own, which end with their parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from typing_extensions import override

from lightning_rft.channel import spawn
from lightning_rft.explorer.launcher import Handle, Launcher, Place
from lightning_rft.explorer.log_tail import log_tail

__all__ = ["LocalLauncher", "LocalProcess"]


class LocalLauncher(Launcher):
    """Starts explorers on this machine, at once."""

    local = True

    @override
    def launch(self, place: Place) -> Handle:
        return LocalProcess(place.environment(), place.log)


class LocalProcess(Handle):
    """A process in a session of its own, so that all it starts can be ended with it; ``log`` takes its output."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.log: Path = log
        self._process, self.channel = spawn(
            "lightning_rft.explorer.worker.main", environment=environment, log=log, own_session=True
        )
        self.name = f"Process {self.pid}"

    @property
    def pid(self) -> int:
        """Process id, which is also that of its process group."""
        return self._process.pid

    @override
    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter on macOS, of one that has ended
            os.killpg(self.pid, signal.SIGKILL)

    @override
    def status(self, timeout_s: float) -> str | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        status = self._process.returncode
        return None if status is None else f"ended with status {status}"

    @property
    @override
    def last_words(self) -> str:
        return f"the end of {self.log}:\n{log_tail(self.log)}"
