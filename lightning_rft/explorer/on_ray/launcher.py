"""Explorers on the nodes of a Ray cluster: Ray starts them, and they dial in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_rft.errors import ConfigurationError, ExplorerError, RFTError
from lightning_rft.explorer.entrance import EVERYWHERE, DialledProcess, Entrance, host_and_port, with_port
from lightning_rft.explorer.launcher import Handle, Launcher, Place
from lightning_rft.explorer.on_ray.messages import Reserve
from lightning_rft.explorer.on_ray.reservation import Reservation, Task
from lightning_rft.explorer.secret import new_secret

__all__ = ["RayLauncher", "RayProcess"]

_PAUSE_S = 5.0  # before Ray is asked for the same again
_WORDS_S = 0.5


class RayLauncher(Launcher):
    """Has a Ray cluster start explorers on its nodes.

    Every explorer is a task in a bundle of one placement group. Ray only starts it: from its node it connects to the
    trainer as with :class:`DialIn`, and what dies is started again by ``ExplorerPool(max_restarts=...)``, not by Ray.
    If a node is lost, its explorers come back as soon as Ray has room for them elsewhere; until then the run goes on
    without them. The run's secret reaches them as an argument of the task. Needs ``pip install 'lightning-rft[ray]'``.

    Args:
        cluster: Address of the cluster's head, as ``ray.init`` takes it; ``"auto"`` for the cluster that this machine
            is a node of. None is started.
        num_cpus: CPUs of each explorer, as many threads of which it uses.
        num_gpus: GPUs of each explorer; left out, as many as the engine takes if the cluster has any.
        resources: What else each explorer needs of its node, such as ``{"accelerator_type:H100": 0.01}``.
        runtime_env: Ray's runtime environment of explorers, such as ``{"env_vars": {"HF_HOME": "/models"}}``.
        bind: Address and port to listen at for explorers. Left out, the address under which Ray knows this node, and a
            port that the system chooses.
        timeout_s: Seconds within which the cluster must have room for all explorers.
        silence_s: Seconds for which a connection may be cut; after these its explorer counts as dead.

    Raises:
        ConfigurationError: Ray is not installed, or a setting cannot work.

    Example::

        explorers = rft.ExplorerPool(rft.VLLMEngine(), count=4, launcher=rft.RayLauncher(num_gpus=1))
    """

    def __init__(
        self,
        cluster: str = "auto",
        num_cpus: float = 1.0,
        num_gpus: float | None = None,
        resources: Mapping[str, float] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        bind: str | None = None,
        timeout_s: float = 60.0,
        silence_s: float = 60.0,
    ) -> None:
        if find_spec("ray") is None:
            raise ConfigurationError("RayLauncher needs Ray, which is not installed: pip install 'lightning-rft[ray]'")
        if min(num_cpus, num_gpus or 0) < 0:
            raise ConfigurationError(f"RayLauncher(num_cpus={num_cpus}, num_gpus={num_gpus}) must be at least 0")
        if timeout_s <= 0 or silence_s < 1:
            raise ConfigurationError(
                f"RayLauncher(timeout_s={timeout_s}, silence_s={silence_s}) must be above 0, and at least 1"
            )
        self._place = None if bind is None else host_and_port(bind, "RayLauncher(bind={!r})")
        self.cluster = cluster
        self.num_cpus = num_cpus
        self.num_gpus = num_gpus
        self.resources = resources
        self.runtime_env = runtime_env
        self.bind = bind
        self.timeout_s = timeout_s
        self.silence_s = silence_s
        self._folder = Path()
        self._count = 0
        self._secret = b""
        self._entrance: Entrance | None = None
        self._reservation: Reservation | None = None
        self._tasks: dict[int, Task] = {}  # by slot
        self._joined: set[int] = set()  # slots that were taken at least once
        self._trouble = ""
        self._again_at = 0.0

    @override
    def open(self, folder: Path, count: int) -> None:
        self._folder, self._count, self._secret = folder, count, new_secret()
        self._joined.clear()
        self._trouble, self._again_at = "", 0.0

    @override
    def launch(self, place: Place) -> Handle | None:
        if self._reservation is None:
            if time.monotonic() < self._again_at:
                return None
            self._reservation = Reservation(self._order(place), self._folder / "ray.log")
        try:
            self._reservation.hear()
        except RFTError as error:
            self._give_back()
            if not self._joined:
                raise
            self._in_trouble(str(error))
            self._again_at = time.monotonic() + _PAUSE_S
            return None
        if self._reservation.address is None:
            return None
        entrance = self._entrance or self._enter(self._reservation.address)
        task = self._tasks.get(place.slot)
        if task is not None:
            process = entrance.admit(replace(place, threads=place.threads or max(1, int(self.num_cpus))))
            if process is not None:
                task.taken = True
                self._joined.add(place.slot)
                self._trouble = ""
                return RayProcess(process, task, self._reservation)
            self._look_after(task, place.slot)
        if task is None or (task.ended and (task.taken or time.monotonic() > task.ended_at + _PAUSE_S)):
            where = with_port(self.address, entrance.port)
            self._tasks[place.slot] = self._reservation.start(place.slot, where, self._secret)
        return None

    @property
    @override
    def missing(self) -> str:
        return f"`ray status` shows what the cluster lacks{self._trouble}; add nodes, or raise the setting"

    @override
    def close(self) -> None:
        entrance, self._entrance = self._entrance, None
        try:
            if entrance is not None:
                entrance.close()
        finally:
            self._give_back()

    def _order(self, place: Place) -> Reserve:
        return Reserve(
            cluster=self.cluster,
            count=self._count,
            resources={"CPU": self.num_cpus, **(self.resources or {})},
            num_gpus=self.num_gpus,
            engine_gpus=place.engine.gpus,
            timeout_s=self.timeout_s,
            runtime_env=self.runtime_env,
        )

    def _enter(self, node: str) -> Entrance:
        """Listens, now that it is known where explorers reach this machine."""
        host, port = self._place or (node, 0)
        setting = f"RayLauncher(bind={with_port(host, port)!r})"
        self._entrance = Entrance(host, port, self._secret, self.silence_s, setting)
        self.address = node if host in EVERYWHERE else host
        return self._entrance

    def _look_after(self, task: Task, slot: int) -> None:
        """Deals with a task that has not brought an explorer, or whose explorer has died."""
        if task.ended is None:
            if task.taken:  # only its process is left, if that
                assert self._reservation is not None
                self._reservation.cancel(task)
        elif not task.taken:
            if task.ended.hopeless and slot not in self._joined:
                raise ExplorerError(f"explorer {slot} could not begin on its node: {task.ended.words}")
            self._in_trouble(task.ended.words)

    def _in_trouble(self, reason: str) -> None:
        self._trouble = f" (Ray: {reason})"

    def _give_back(self) -> None:
        reservation, self._reservation = self._reservation, None
        self._tasks.clear()
        if reservation is not None:
            reservation.close()


class RayProcess(Handle):
    """An explorer that a task of Ray's runs, at the other end of its connection."""

    def __init__(self, process: DialledProcess, task: Task, reservation: Reservation) -> None:
        host, pid = process.about.host, process.about.pid
        self.name = f"the explorer on {host} (of Ray's process {pid})"
        self.log = f"Ray's log of process {pid} on {host}"
        self.channel = process.channel
        self._process = process
        self._task = task
        self._reservation = reservation

    @override
    def kill(self) -> None:
        self._process.kill()

    @override
    def status(self, timeout_s: float) -> str | None:
        gone = self._process.status(timeout_s)
        if gone is not None and self._task.ended is None:
            with contextlib.suppress(RFTError):  # nobody says more
                self._reservation.hear(min(timeout_s, _WORDS_S), of=self._task)
        return self._task.ended.how if gone and self._task.ended else gone

    @property
    @override
    def last_words(self) -> str:
        return (self._task.ended and self._task.ended.words) or f"see {self.log}"
