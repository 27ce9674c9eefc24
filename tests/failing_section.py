"""A section of ``benchmarks.gpu`` in which much goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Figures, Measurement
from lightning_rft.errors import ConfigurationError


def hang(send: Any, folder: Path) -> None:
    """Says who it is, and what it has started, and does nothing more."""
    started = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    (folder / "pids").write_text(f"{os.getpid()} {started.pid}")
    threading.Event().wait()


def measurements(machine: Machine) -> Iterator[Measurement]:
    def who() -> Figures:
        return {"pid": os.getpid()}

    def crashes() -> Figures:
        print("the last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def hangs() -> Figures:
        hang(None, machine.folder)
        return {}

    def raises() -> Figures:
        raise ZeroDivisionError("as it should")

    def is_refused() -> Figures:
        raise ConfigurationError("2 GPUs are not enough")

    yield from map(Measurement, ["first", "crashes", "after a crash"], [who, crashes, who])
    yield from map(Measurement, ["hangs", "raises", "is refused", "last"], [hangs, raises, is_refused, who])
