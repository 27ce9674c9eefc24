"""Launchers, which start explorers' processes here or elsewhere; the pool supervises all of them alike."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lightning_rft.channel import Channel
from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.hardware import available_cpus

__all__ = ["GRACE_S", "Handle", "Launcher", "Place", "end_all"]

_log = logging.getLogger(__name__)

#: Seconds that a process may take to end when asked, and then to be gone when killed.
GRACE_S = 3.0


@dataclass(frozen=True)
class Place:
    """A place for an explorer, and what its process is to be started with."""

    slot: int
    engine: Engine
    #: CPU threads; None for all that its process may use.
    threads: int | None
    #: ``CUDA_VISIBLE_DEVICES``; None for what its process finds there.
    devices: str | None
    #: Takes the output of a process on this machine.
    log: Path

    def environment(self) -> dict[str, str]:
        """Environment variables of the process, for the machine on which this is called."""
        variables = self.engine.environment(self.threads or available_cpus())
        return variables if self.devices is None else variables | {"CUDA_VISIBLE_DEVICES": self.devices}


class Handle(ABC):
    """One explorer's process, as rank 0 has it."""

    channel: Channel
    #: The process, for messages, and where its output is.
    name: str
    log: Path | str

    @abstractmethod
    def kill(self) -> None:
        """Ends the process and everything that it started; from any thread, and more than once."""

    @abstractmethod
    def status(self, timeout_s: float) -> str | None:
        """How it ended, such as "ended with status -9"; ``None`` if it is still there after ``timeout_s``."""

    @property
    def last_words(self) -> str:
        """Where its output is, and the end of it if that is on this machine."""
        return f"see {self.log}"


class Launcher(ABC):
    """Starts the processes of a pool's explorers, or waits for them to come.

    It supervises nothing: :class:`ExplorerPool` listens to all explorers alike, watches for their death, and asks for
    another one in the place of each that died.
    """

    #: Whether explorers run on this machine, and share its cores and GPUs with the trainer.
    local: bool = False
    #: Host name or address at which explorers reach the trainer.
    address: str = "127.0.0.1"

    def open(self, folder: Path, count: int) -> None:
        """Gets ready to launch ``count`` explorers; ``folder`` is the run's own."""

    @abstractmethod
    def launch(self, place: Place) -> Handle | None:
        """Starts a process for a place, and returns at once; ``None`` if there is none for it yet: ask again."""

    @property
    def missing(self) -> str:
        """What vacant places are waiting for, and what to do about it; ends a message."""
        return "see the explorers' logs"

    def close(self) -> None:
        """Ends what is not an explorer's; safe to call twice."""


def end_all(processes: Collection[Handle], grace_s: float | None = None) -> None:
    """Asks, waits, kills: processes and everything they started; waits no longer for one that the kernel holds."""
    grace_s = GRACE_S if grace_s is None else grace_s
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
                "%s was killed and is not gone %g s later: a device or disk may hold it. See %s.",
                *(process.name, GRACE_S, process.log),
            )
        process.channel.close()


def _wait(processes: Collection[Handle], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.status(max(0.0, deadline - time.monotonic()))
