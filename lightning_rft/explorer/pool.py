"""The pool of explorers: starts them, hands them messages, starts those again that die, and ends them."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast, get_args

from lightning_rft.errors import ConfigurationError, DeadlineError, ExplorerError
from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.explorer.launcher import GRACE_S, Handle, Launcher, Place, end_all
from lightning_rft.explorer.local import LocalLauncher, LocalProcess
from lightning_rft.explorer.messages import Died, Explored, Failed, Prepare, Several, Started
from lightning_rft.explorer.placement import Placement, Sharing
from lightning_rft.explorer.places import Places
from lightning_rft.explorer.restarts import Restarts
from lightning_rft.explorer.spec import ExplorerSpec, check_travels
from lightning_rft.hardware import available_cpus, share_cores

__all__ = ["ExplorerPool"]

# where launchers say which of the trainer's processes this is
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


@dataclass
class _Member:
    """One explorer; ``slot`` says which devices and log it has."""

    slot: int
    process: Handle
    deadline: float = float("inf")
    started: Started | None = None
    worked: bool = False  # has finished a group
    blame: str = ""  # why it was killed, if it was


class ExplorerPool:
    """Owns the explorer processes.

    ``RFTDataModule(explorers=2)`` makes one by itself. Made by hand it can be launched before Lightning is imported, so
    that both sides import at the same time::

        explorers = rft.ExplorerPool(rft.VLLMEngine(), log_dir="runs/explorers")
        explorers.launch()
        import lightning as L
        ...
        data = rft.RFTDataModule(tasks=tasks, reward=reward, explorers=explorers)

    An explorer that dies is started again, after a pause that doubles with every death, and under a new index: whatever
    is known of the old one ends with it. Errors that starting again would not mend end the run: an exception in an
    explorer that has not finished a single group, and an engine that never came up in time.

    Args:
        engine: What each runs; an engine of its own each.
        count: How many.
        devices: ``CUDA_VISIBLE_DEVICES`` of each, such as ``["1", "2"]``, or ``["2,3", "4,5"]`` with two GPUs for each;
            left out, the data module hands out GPUs by ``placement``. A pool that is launched by hand on several GPUs
            must name them.
        placement: ``"separate"`` for GPUs that the trainer does not use, ``"shared"`` for the trainer's own, or
            ``"auto"`` for the first, but a single GPU is shared with a single explorer. What it comes to is printed
            (``trainer: GPUs 0-1; explorers: 2, 3``); where GPUs do not suffice, nothing starts.
        log_dir: Folder that takes ``explorer-<i>.log``; left out, ``rft`` in the trainer's log folder.
        threads: CPU threads of each; left out, an equal share of the cores, or of half of them where the strategy has
            explorers and trainer work at the same time on CPUs.
        max_restarts: How many deaths of each explorer within ``restart_window_s`` are survived; one more ends the run.
        restart_window_s: Seconds after which a death is forgotten.
        launcher: What starts explorers; left out, processes on this machine. See :class:`DialIn`, :class:`RayLauncher`.

    Raises:
        ConfigurationError: ``count`` is below 1, ``devices`` are not as many, ``placement`` is none of the three, or
            ``max_restarts`` is negative.
    """

    def __init__(
        self,
        engine: Engine,
        count: int = 1,
        devices: Sequence[str] | None = None,
        placement: Sharing = "auto",
        log_dir: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        max_restarts: int = 5,
        restart_window_s: float = 600.0,
        launcher: Launcher | None = None,
    ) -> None:
        if count < 1:
            raise ConfigurationError(f"explorers={count} must be at least 1")
        if devices is not None and len(devices) != count:
            raise ConfigurationError(
                f"devices={list(devices)} names GPUs for {len(devices)} explorers, but there are {count}: give each "
                "one entry, such as '0' or '0,1'"
            )
        if placement not in get_args(Sharing):
            raise ConfigurationError(f"placement={placement!r}: choose one of {', '.join(get_args(Sharing))}")
        if threads is not None and threads < 1:
            raise ConfigurationError(f"threads={threads} must be at least 1")
        if max_restarts < 0:
            raise ConfigurationError(f"max_restarts={max_restarts} must be at least 0")
        self.engine = engine
        self.count = count
        self.devices = devices
        self.placement = placement
        self.log_dir = log_dir
        self.threads = threads
        self.max_restarts = max_restarts
        self.restart_window_s = restart_window_s
        self.launcher = launcher or LocalLauncher()
        self.assigned = False  # whether the processes know what to run
        self._spec: ExplorerSpec | None = None
        self.placed = Placement()  # as far as this machine goes
        self._members: dict[int, _Member] = {}
        self._next_index = 0
        self._restarts = Restarts(max_restarts, restart_window_s)
        self._places = Places(self.launcher, self._restarts)
        self._finalizer: weakref.finalize[..., Any] | None = None

    def launch(self, log_dir: str | os.PathLike[str] | None = None) -> None:
        """Starts the processes, which import what the engine needs, and returns at once; does nothing if they run.

        Of several trainer ranks, which all run the same script, only the first does anything.

        Args:
            log_dir: Folder for logs where the pool names none.

        Raises:
            ConfigurationError: There is no folder for logs, or the engine cannot be sent to another process.
        """
        if all(os.environ.get(name, "0") == "0" for name in _RANKS):
            self._launch(log_dir)

    def _launch(
        self,
        log_dir: str | os.PathLike[str] | None,
        devices: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        if self.running:
            return
        folder = self.log_dir or log_dir
        if folder is None:
            raise ConfigurationError("set ExplorerPool(log_dir=...) to launch explorers before a trainer is known")
        check_travels(engine=self.engine)
        folder, devices = Path(folder), self.devices or devices
        threads = self.threads or threads or share_cores(available_cpus(), self.count, overlap=False)[0]
        if not self.launcher.local:
            threads = self.threads  # of other machines only they know how many there are
        folder.mkdir(parents=True, exist_ok=True)
        places = [
            Place(slot, self.engine, threads, names, folder / f"explorer-{slot}.log")
            for slot, names in enumerate(devices or [None] * self.count)
        ]
        self._places.open(folder, places)
        # ends the processes even if the owner forgets to, or the interpreter exits
        self._finalizer = weakref.finalize(self, _end, self._members, self.launcher)
        self._fill()

    def start(
        self,
        spec: ExplorerSpec,
        log_dir: Path | None = None,
        placement: Placement | None = None,
        threads: int | None = None,
    ) -> None:
        """Has every process load its engine, launching it if need be, and returns at once; once is enough.

        ``log_dir`` and ``threads`` (of each) count where the pool names none. Raises :class:`ConfigurationError` if the
        reward or workflow cannot be sent to another process.
        """
        if self.assigned:
            return
        check_travels(reward=spec.reward, workflow=spec.workflow)
        self.placed = placement or Placement()
        self._launch(log_dir, self.placed.devices, threads)
        self._spec = spec
        self.assigned = True
        for index in self._members:
            self._assign(index)
        self._places.begin(spec.timeouts.start_s, time.monotonic())

    def stop(self) -> None:
        """Ends every process; safe to call twice."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None
        self._places.close()
        self._spec = None
        self.assigned = False

    @property
    def restarts(self) -> int:
        """How often an explorer was started again."""
        return self._restarts.total

    @property
    def running(self) -> bool:
        """Whether the processes were started and not stopped."""
        return self._finalizer is not None

    @property
    def starting(self) -> bool:
        """Whether an engine is yet to come up, or to come up again; there is a deadline for it."""
        return self.running and len(self.up) < self._places.needed

    @property
    def coming_up(self) -> bool:
        """Whether an engine is just starting, and takes memory for it."""
        return len(self.up) + self._restarts.vacant < self.count

    def hold(self, held: bool) -> None:
        """Has those that died wait to be started again, as long as the GPUs are the trainer's."""
        self._restarts.held = held

    @property
    def ready(self) -> bool:
        """Whether every engine is up, but for those that died while nobody takes their place."""
        return self.running and not self.starting

    @property
    def address(self) -> str:
        """Host name or address at which explorers reach the trainer."""
        return self.launcher.address

    @property
    def dtype(self) -> str:
        """Dtype of the engines' weights."""
        return next(iter(self._places.came_up.values())).dtype

    @property
    def nccl(self) -> bool:
        """Whether every engine can be a member of an NCCL group with the trainer."""
        return self.placed.nccl and all(started.nccl for started in self._places.came_up.values())

    @property
    def up(self) -> dict[int, Started]:
        """Explorers whose engine is up, with what each said of it."""
        members = list(self._members.items())  # another thread may be listening
        return {index: member.started for index, member in members if member.started is not None}

    def pid(self, explorer: int) -> int:
        """Process id of an explorer on this machine, which leads a process group of its own."""
        return cast(LocalProcess, self._members[explorer].process).pid

    def send(self, explorer: int, *messages: Any) -> None:
        """Sends messages, which arrive together; :meth:`poll` tells of an explorer that is gone or does not read."""
        member = self._members.get(explorer)
        if member is not None:
            try:
                member.process.channel.send(messages[0] if len(messages) == 1 else Several(messages))
            except OSError:
                self.kill(explorer, "does not read what is sent to it")

    def kill(self, explorer: int, blame: str) -> None:
        """Ends an explorer; ``blame`` is what it did, for the message "explorer 3 ..."."""
        member = self._members.get(explorer)
        if member is not None:
            member.blame = member.blame or blame
            member.process.kill()

    def poll(self, timeout_s: float) -> list[tuple[int, Any]]:
        """Messages that have come, each with its explorer, waiting for the first at most ``timeout_s``.

        Explorers that died are started again; a :class:`Died` tells of each.

        Raises:
            ExplorerError: Explorers died more often than ``max_restarts`` allows; with the last lines of the log.
            DeadlineError: An engine was not ready in time, or a place stayed vacant.
            Exception: Whatever ended an explorer that never worked, its own traceback as the cause.
        """
        self._fill()
        lines = {member.process.channel.fileno(): index for index, member in self._members.items()}
        messages = []
        for line in wait(list(lines), timeout_s):
            index = lines[cast(int, line)]
            member = self._members[index]
            try:
                message = member.process.channel.receive()
            except (EOFError, OSError):
                message = Died(self._gone(index))
            if isinstance(message, Failed):
                error = message.failure.unpack(f"explorer {index} (log: {member.process.log})")
                if not isinstance(error, Exception) or not member.worked:
                    raise error
                message = Died(error)
            if isinstance(message, Started):
                member.started = self._places.came_up[member.slot] = message
            member.worked |= isinstance(message, Explored)
            if isinstance(message, Died):
                self._bury(index, message.error)
            messages.append((index, message))
        self._check_deadlines()
        return messages

    def _check_deadlines(self) -> None:
        if self._spec is None:
            return
        limit = f"Timeouts(start_s={self._spec.timeouts.start_s:g})"
        now = time.monotonic()
        self._places.check(now, limit)
        for index, member in self._members.items():
            if member.started is None and now > member.deadline:
                if member.slot in self._places.came_up:
                    self.kill(index, f"was not ready again within {limit}")
                else:
                    raise DeadlineError(
                        f"only {len(self.up)} of {self.count} explorers were ready within {limit}: see "
                        f"{member.process.log}, or raise the setting"
                    )

    def _fill(self) -> None:
        """Has explorers take the places that are vacant, as far as there are any."""
        for slot, process in self._places.fill(time.monotonic()):
            index, self._next_index = self._next_index, self._next_index + 1
            self._members[index] = _Member(slot, process)
            self.send(index, Prepare(self.engine))
            if self._spec is not None:
                self._assign(index)

    def _assign(self, index: int) -> None:
        assert self._spec is not None
        self._members[index].deadline = time.monotonic() + self._spec.timeouts.start_s
        self.send(index, self._spec)

    def _bury(self, index: int, error: Exception) -> None:
        """Ends what is left of an explorer and plans its successor, or gives up."""
        member = self._members.pop(index)
        end_all([member.process], grace_s=0)
        if not self._places.died(member.slot, time.monotonic()):
            raise error

    def _gone(self, index: int) -> ExplorerError:
        member = self._members[index]
        status = member.process.status(GRACE_S)
        what = member.blame or status or "hangs"
        limits = f" (max_restarts={self.max_restarts} within restart_window_s={self.restart_window_s:g})"
        budget = limits if self._restarts.spent(member.slot, time.monotonic()) else ""
        return ExplorerError(f"explorer {index} {what}{budget}; {member.process.last_words}")


def _end(members: dict[int, _Member], launcher: Launcher) -> None:
    try:
        end_all([member.process for member in members.values()])
    finally:
        members.clear()
        launcher.close()
