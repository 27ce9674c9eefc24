"""The driver of a Ray job, in a process of its own: ``python -m lightning_rft.explorer.on_ray.driver FD PARENT``.

Ray ends a driver's process when the cluster's head is lost, handles its signals, and has calls without deadlines: none
of this is to befall the trainer. What Ray prints goes to this process's log. When rank 0 is gone this process ends, and
with its job Ray ends the tasks.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayTaskError, RuntimeEnvSetupError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lightning_rft.channel import Channel
from lightning_rft.errors import ConfigurationError, DeadlineError, ExplorerError, RFTError
from lightning_rft.explorer.on_ray.messages import Broken, Cancel, Ended, Reserve, Reserved, Start
from lightning_rft.explorer.on_ray.shortage import described, shortage
from lightning_rft.explorer.on_ray.task import explore

__all__ = ["main"]

_POLL_S = 1  # Ray takes whole seconds
_KNOCK_S = 10.0


@dataclass(frozen=True)
class _Done:
    """From Ray: a task has ended."""

    task: int
    future: Future[Any]


class _Driver:
    """Does what rank 0 asks for, until it is told to end."""

    def __init__(self, channel: Channel, inbox: SimpleQueue[Any]) -> None:
        self._channel = channel
        self._inbox = inbox
        self._tasks: dict[int, Any] = {}

    def run(self) -> None:
        began, order = time.monotonic(), self._inbox.get()
        if not isinstance(order, Reserve):  # told to end already
            return
        try:
            _knock(order.cluster)
            ray.init(
                order.cluster,
                runtime_env=order.runtime_env and dict(order.runtime_env),
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except Exception as error:  # Ray raises many kinds
            raise ConfigurationError(
                f"RayLauncher(cluster={order.cluster!r}) cannot connect to a Ray cluster ({error}): start one by `ray "
                "start --head`, or name the address of one"
            ) from error
        try:
            self._work(order, began + order.timeout_s)
        finally:
            ray.shutdown()

    def _work(self, order: Reserve, deadline: float) -> None:
        gpus = order.num_gpus
        if gpus is None:
            gpus = order.engine_gpus if ray.cluster_resources().get("GPU") else 0
        bundle = {name: float(amount) for name, amount in {**order.resources, "GPU": gpus}.items() if amount}
        group = placement_group([bundle] * order.count)
        try:
            while not group.wait(_POLL_S):
                if not self._inbox.empty():  # nothing is asked for yet but to end
                    return
                if time.monotonic() > deadline:
                    raise DeadlineError(_too_little(order, bundle))
            self._channel.send(Reserved(ray.util.get_node_ip_address()))
            while (message := self._inbox.get()) is not None:
                if isinstance(message, Start):
                    self._start(message, group, bundle)
                elif isinstance(message, Cancel) and message.task in self._tasks:
                    ray.cancel(self._tasks[message.task], force=True)
                elif isinstance(message, _Done):
                    del self._tasks[message.task]
                    self._channel.send(_ended(message))
        finally:
            remove_placement_group(group)

    def _start(self, message: Start, group: PlacementGroup, bundle: dict[str, float]) -> None:
        others = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU", "memory")}
        task = ray.remote(explore).options(
            name=f"explorer-{message.slot}",
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            memory=bundle.get("memory"),
            resources=others,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=message.slot),
            max_retries=0,  # the pool starts explorers again
            retry_exceptions=False,
        )
        started = self._tasks[message.task] = task.remote(message.slot, message.address, message.secret)
        started.future().add_done_callback(lambda future: self._inbox.put(_Done(message.task, future)))


def _knock(cluster: str) -> None:
    """Raises ``OSError`` if nothing listens at an address, where Ray itself would try for minutes."""
    host, _, port = cluster.rpartition(":")
    if "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()


def _too_little(order: Reserve, bundle: dict[str, float]) -> str:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return (
        f"Ray has not reserved {described(bundle)} for each of {order.count} explorers within RayLauncher(timeout_s="
        f"{order.timeout_s:g}): {shortage(order.count, bundle, nodes, ray.available_resources())}. `ray status` shows "
        "who has what. Ask for less by ExplorerPool(count=...) or RayLauncher(num_cpus=..., num_gpus=..., "
        "resources=...), add nodes, or raise the setting"
    )


def _ended(done: _Done) -> Ended:
    error = done.future.exception()
    if error is None:
        return Ended(done.task, *done.future.result())
    hopeless = isinstance(error, RayTaskError | RuntimeEnvSetupError)
    return Ended(done.task, f"is gone ({type(error).__name__})", str(error), hopeless)


def _listen(channel: Channel, inbox: SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(channel.receive())
    except (EOFError, OSError):
        os._exit(1)  # rank 0 is gone, and the main thread may be in a call of Ray's


def main() -> None:
    """Entry point of the process."""
    channel, inbox = Channel(int(sys.argv[1])), SimpleQueue[Any]()
    threading.Thread(target=_listen, args=(channel, inbox), name="listener", daemon=True).start()
    try:
        _Driver(channel, inbox).run()
    except RFTError as error:
        channel.send(Broken(error))
    except Exception as error:
        traceback.print_exc()
        channel.send(Broken(ExplorerError(f"Ray failed ({type(error).__name__}: {error})")))


if __name__ == "__main__":
    main()
