"""The explorer processes, as rank 0 sees them: started, spoken to, listened to, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

import cloudpickle

from lightning_rft.errors import ConfigurationError, DeadlineError, ExplorerError
from lightning_rft.experience import TensorInfo
from lightning_rft.explorer.connection import Channel, Connect, Failed, Load, Started, spawn
from lightning_rft.explorer.worker import ExplorerSpec
from lightning_rft.hardware import available_cpus

__all__ = ["ExplorerPool"]

_LOG_LINES = 20
_GRACE_S = 3.0


class ExplorerPool:
    """Owns the explorer processes.

    Args:
        spec: What every explorer runs.
        count: How many.
        log_dir: Folder that takes ``explorer-<i>.log``.
        gpus: ``CUDA_VISIBLE_DEVICES`` of each explorer; ``None`` where it has no GPU of its own.
        start_timeout_s: Seconds within which an engine must be ready.
    """

    def __init__(
        self, spec: ExplorerSpec, count: int, log_dir: Path, start_timeout_s: float, gpus: Sequence[str] | None = None
    ) -> None:
        self._spec = spec
        self._count = count
        self._log_dir = log_dir
        self._gpus = gpus
        self._start_timeout_s = start_timeout_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._started: dict[int, Started] = {}
        self._deadline = 0.0
        self._finalizer: weakref.finalize[..., Any] | None = None

    def start(self) -> None:
        """Starts the processes and returns at once; they load their engines in the background.

        Raises:
            ConfigurationError: The reward, workflow or engine cannot be sent to another process.
        """
        if self._processes:
            return
        for setting in ("reward", "workflow", "engine"):
            try:
                cloudpickle.dumps(getattr(self._spec, setting))
            except Exception as error:  # pickling runs any object's own code
                raise ConfigurationError(
                    f"{setting} cannot be sent to an explorer process ({error}): keep open files, locks, models and "
                    "connections out of it, or create them where they are used"
                ) from error
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._deadline = time.monotonic() + self._start_timeout_s
        threads = max(1, available_cpus() // self._count)
        # ends the processes even if the owner forgets to, or the interpreter exits
        self._finalizer = weakref.finalize(self, _end, self._processes, self._channels)
        for index in range(self._count):
            process, channel = spawn(
                "lightning_rft.explorer.worker",
                environment=self._spec.engine.environment(threads) | self._visible_gpus(index),
                log=self._log(index),
                own_session=True,
            )
            self._processes.append(process)
            self._channels.append(channel)
            channel.send(self._spec)

    def stop(self) -> None:
        """Ends every process; safe to call twice."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None
        self._started.clear()

    @property
    def running(self) -> bool:
        """Whether the processes were started and not stopped."""
        return bool(self._processes)

    @property
    def ready(self) -> bool:
        """Whether every engine is up."""
        return self.running and len(self._started) == self._count

    @property
    def dtype(self) -> str:
        """Dtype of the engines' weights."""
        return self._started[0].dtype

    @property
    def nccl(self) -> bool:
        """Whether every engine takes an NCCL link: NCCL refuses two members on one GPU."""
        return self._gpus is not None and all(started.nccl for started in self._started.values())

    def members(self) -> dict[int, int]:
        """Explorer index -> number of processes inside it that hold weights; those whose engine is up."""
        return {index: started.world_size for index, started in sorted(self._started.items())}

    def send(self, explorer: int, message: Any) -> None:
        """Sends a message.

        Raises:
            ExplorerError: The explorer is gone, or was stopped and does not read.
        """
        try:
            self._channels[explorer].send(message)
        except OSError as error:
            raise self._gone(explorer) from error

    def connect(self, explorer: int, link: Any) -> None:
        """Asks an explorer to join a weight transport."""
        self.send(explorer, Connect(link))

    def load(self, explorer: int, manifest: Sequence[TensorInfo], version: int) -> None:
        """Asks an explorer to receive a version."""
        self.send(explorer, Load(manifest, version))

    def poll(self, timeout_s: float) -> list[tuple[int, Any]]:
        """Messages that have come, each with its explorer, waiting for the first at most ``timeout_s``.

        Raises:
            ExplorerError: An explorer died, with the last lines of its log.
            DeadlineError: An engine was not ready in time.
            Exception: Whatever ended an explorer, its own traceback as the cause.
        """
        indices = {channel.fileno(): index for index, channel in enumerate(self._channels)}
        messages = []
        for line in wait(list(indices), timeout_s):
            index = indices[cast(int, line)]
            try:
                message = self._channels[index].receive()
            except (EOFError, OSError) as error:
                raise self._gone(index) from error
            if isinstance(message, Failed) and message.key is None:
                raise message.failure.unpack(f"explorer {index} (log: {self._log(index)})")
            if isinstance(message, Started):
                self._started[index] = message
            messages.append((index, message))
        if not self.ready and time.monotonic() > self._deadline:
            raise DeadlineError(
                f"only {len(self._started)} of {self._count} explorers were ready within "
                f"start_timeout_s={self._start_timeout_s:g}: see {self._log(0)}, or raise the setting"
            )
        return messages

    def _visible_gpus(self, index: int) -> dict[str, str]:
        return {} if self._gpus is None else {"CUDA_VISIBLE_DEVICES": self._gpus[index]}

    def _log(self, index: int) -> Path:
        return self._log_dir / f"explorer-{index}.log"

    def _gone(self, index: int) -> ExplorerError:
        process = self._processes[index]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        status = "was stopped or hangs" if process.returncode is None else f"ended with status {process.returncode}"
        lines = self._log(index).read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return ExplorerError(f"explorer {index} {status}; the end of {self._log(index)}:\n" + "\n".join(lines))


def _end(processes: list[subprocess.Popen[bytes]], channels: list[Channel]) -> None:
    """Asks, waits, kills: every process and what it started is gone when this returns."""
    for channel in channels:
        with contextlib.suppress(OSError):
            channel.send(None)
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_GRACE_S)
    for channel in channels:
        channel.close()
    processes.clear()
    channels.clear()
