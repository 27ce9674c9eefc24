"""What is reserved for explorers on a Ray cluster, and the tasks there, as rank 0 has them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lightning_rft.channel import spawn
from lightning_rft.errors import DeadlineError, ExplorerError
from lightning_rft.explorer.log_tail import log_tail
from lightning_rft.explorer.on_ray.messages import Broken, Cancel, Ended, Reserve, Reserved, Start

__all__ = ["Reservation", "Task"]

_MORE_S = 10.0  # that the driver has to say by itself what it waited for in vain
_END_S = 5.0


@dataclass
class Task:
    """A task that runs the explorer of a place."""

    number: int
    #: Whether its explorer has taken the place.
    taken: bool = False
    cancelled: bool = False
    ended: Ended | None = None
    ended_at: float = 0.0


class Reservation:
    """Has a driver's process, which writes to ``log``, reserve what is ordered; closing it ends all tasks."""

    def __init__(self, order: Reserve, log: Path) -> None:
        #: Where the cluster's nodes reach this one; ``None`` until all is reserved.
        self.address: str | None = None
        self._cluster = order.cluster
        self._timeout_s = order.timeout_s
        self._deadline = time.monotonic() + order.timeout_s + _MORE_S
        self._log = log
        self._tasks: dict[int, Task] = {}  # those that have not ended
        self._started = 0
        self._lock = threading.Lock()
        self._process, self._channel = spawn("lightning_rft.explorer.on_ray.driver", log=log, own_session=True)
        self._say(order)

    def hear(self, timeout_s: float = 0.0, of: Task | None = None) -> None:
        """Takes in what the driver has said; waits so long for the end ``of`` a task.

        Raises:
            ConfigurationError: There is no such cluster.
            DeadlineError: There is too little, and what; or Ray did not answer at all.
            ExplorerError: The driver has ended.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while self._take_in(0.0 if of is None or of.ended else max(0.0, deadline - time.monotonic())):
                pass
        if self.address is None and time.monotonic() > self._deadline:
            raise DeadlineError(
                f"no Ray cluster has answered at cluster={self._cluster!r} within RayLauncher(timeout_s="
                f"{self._timeout_s:g}): see {self._log} and `ray status`, or raise the setting"
            )

    def start(self, slot: int, address: str, secret: bytes) -> Task:
        """Starts a task for a place, which dials an address once there is room for it."""
        self._started += 1
        task = self._tasks[self._started] = Task(self._started)
        self._say(Start(task.number, slot, address, secret))
        return task

    def cancel(self, task: Task) -> None:
        """Kills the process of a task, if it has one; once is enough."""
        if not task.cancelled:
            task.cancelled = True
            self._say(Cancel(task.number))

    def close(self) -> None:
        """Ends all tasks, and gives back what is reserved; safe to call twice."""
        self._say(None)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # with its connection to the cluster everything else ends, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_END_S)
        self._channel.close()

    def _say(self, message: Reserve | Start | Cancel | None) -> None:
        with contextlib.suppress(OSError):  # it has ended, as will be heard
            self._channel.send(message)

    def _take_in(self, timeout_s: float) -> bool:
        """Takes in one message; whether there was one."""
        try:
            message = self._channel.receive(timeout_s)
        except TimeoutError:
            return False
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
            raise ExplorerError(
                f"the process that talks to Ray has ended with status {self._process.returncode}; the end of "
                f"{self._log}:\n{log_tail(self._log)}"
            ) from error
        if isinstance(message, Broken):
            raise message.error
        if isinstance(message, Reserved):
            self.address = message.address
        if isinstance(message, Ended):
            task = self._tasks.pop(message.task)
            task.ended, task.ended_at = message, time.monotonic()
        return True
