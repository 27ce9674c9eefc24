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
from lightning_rft.explorer.connection import Channel, Connect, Failed, Load, Prepare, Started, spawn
from lightning_rft.explorer.engine import Engine
from lightning_rft.explorer.worker import ExplorerSpec
from lightning_rft.hardware import available_cpus

__all__ = ["ExplorerPool"]

_LOG_LINES = 20
_GRACE_S = 3.0


class ExplorerPool:
    """Owns the explorer processes.

    ``RFTDataModule(explorers=2)`` makes one by itself. Made by hand it can be launched before Lightning is imported, so
    that both sides import at the same time::

        explorers = rft.ExplorerPool(rft.VLLMEngine(), log_dir="runs/explorers")
        explorers.launch()
        import lightning as L
        ...
        data = rft.RFTDataModule(tasks=tasks, reward=reward, explorers=explorers)

    Args:
        engine: What each runs; an engine of its own each.
        count: How many.
        devices: ``CUDA_VISIBLE_DEVICES`` of each, such as ``["1", "2"]``, or ``["2,3", "4,5"]`` with two GPUs for each;
            left out, the data module hands out what the trainer does not use.
        log_dir: Folder that takes ``explorer-<i>.log``; left out, ``rft`` in the trainer's log folder.

    Raises:
        ConfigurationError: ``count`` is below 1, or ``devices`` are not as many.
    """

    def __init__(
        self,
        engine: Engine,
        count: int = 1,
        devices: Sequence[str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if count < 1:
            raise ConfigurationError(f"explorers={count} must be at least 1")
        if devices is not None and len(devices) != count:
            raise ConfigurationError(
                f"devices={list(devices)} names GPUs for {len(devices)} explorers, but there are {count}: give each "
                "one entry, such as '0' or '0,1'"
            )
        self.engine = engine
        self.count = count
        self.devices = devices
        self.log_dir = log_dir
        self.assigned = False  # whether the processes know what to run
        self._logs = Path()
        self._nccl = False
        self._start_timeout_s = 0.0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._started: dict[int, Started] = {}
        self._deadline = float("inf")
        self._finalizer: weakref.finalize[..., Any] | None = None

    def launch(self, log_dir: Path | None = None, devices: Sequence[str] | None = None) -> None:
        """Starts the processes, which import what the engine needs, and returns at once; does nothing if they run.

        Args:
            log_dir: Folder for logs where the pool names none.
            devices: GPUs where the pool names none.

        Raises:
            ConfigurationError: There is no folder for logs, or the engine cannot be sent to another process.
        """
        if self._processes:
            return
        folder = self.log_dir or log_dir
        if folder is None:
            raise ConfigurationError("set ExplorerPool(log_dir=...) to launch explorers before a trainer is known")
        self._logs, devices = Path(folder), self.devices or devices
        self._nccl = devices is not None
        _check_travels(engine=self.engine)
        self._logs.mkdir(parents=True, exist_ok=True)
        threads = max(1, available_cpus() // self.count)
        # ends the processes even if the owner forgets to, or the interpreter exits
        self._finalizer = weakref.finalize(self, _end, self._processes, self._channels)
        for index in range(self.count):
            process, channel = spawn(
                "lightning_rft.explorer.worker",
                environment=self.engine.environment(threads)
                | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices[index]}),
                log=self._log(index),
                own_session=True,
            )
            self._processes.append(process)
            self._channels.append(channel)
            channel.send(Prepare(self.engine))

    def start(
        self,
        spec: ExplorerSpec,
        start_timeout_s: float,
        log_dir: Path | None = None,
        devices: Sequence[str] | None = None,
    ) -> None:
        """Has every process load its engine, launching it if need be, and returns at once; once is enough.

        Args:
            spec: What every explorer runs.
            start_timeout_s: Seconds within which an engine must be ready.
            log_dir: As for :meth:`launch`.
            devices: As for :meth:`launch`.

        Raises:
            ConfigurationError: The reward or workflow cannot be sent to another process.
        """
        if self.assigned:
            return
        _check_travels(reward=spec.reward, workflow=spec.workflow)
        self.launch(log_dir, devices)
        self._start_timeout_s = start_timeout_s
        self._deadline = time.monotonic() + start_timeout_s
        self.assigned = True
        for index in range(self.count):
            self.send(index, spec)

    def stop(self) -> None:
        """Ends every process; safe to call twice."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None
        self._started.clear()
        self.assigned = False

    @property
    def running(self) -> bool:
        """Whether the processes were started and not stopped."""
        return bool(self._processes)

    @property
    def ready(self) -> bool:
        """Whether every engine is up."""
        return self.running and len(self._started) == self.count

    @property
    def dtype(self) -> str:
        """Dtype of the engines' weights."""
        return self._started[0].dtype

    @property
    def nccl(self) -> bool:
        """Whether every engine takes an NCCL link: NCCL refuses two members on one GPU."""
        return self._nccl and all(started.nccl for started in self._started.values())

    def max_num_seqs(self, explorer: int) -> int:
        """Most samples that an explorer's engine runs at once."""
        return self._started[explorer].max_num_seqs

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
                f"only {len(self._started)} of {self.count} explorers were ready within "
                f"start_timeout_s={self._start_timeout_s:g}: see {self._log(0)}, or raise the setting"
            )
        return messages

    def _log(self, index: int) -> Path:
        return self._logs / f"explorer-{index}.log"

    def _gone(self, index: int) -> ExplorerError:
        process = self._processes[index]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        status = "was stopped or hangs" if process.returncode is None else f"ended with status {process.returncode}"
        lines = self._log(index).read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return ExplorerError(f"explorer {index} {status}; the end of {self._log(index)}:\n" + "\n".join(lines))


def _check_travels(**settings: Any) -> None:
    for setting, value in settings.items():
        try:
            cloudpickle.dumps(value)
        except Exception as error:  # pickling runs any object's own code
            raise ConfigurationError(
                f"{setting} cannot be sent to an explorer process ({error}): keep open files, locks, models and "
                "connections out of it, or create them where they are used"
            ) from error


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
