"""Messages between rank 0 and the process that is the driver of a Ray job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Broken", "Cancel", "Ended", "Reserve", "Reserved", "Start"]


@dataclass(frozen=True)
class Reserve:
    """To the driver, first: connect to a cluster, and reserve what explorers need."""

    cluster: str
    count: int
    #: Resources of each explorer, but for GPUs.
    resources: Mapping[str, float]
    #: GPUs of each explorer; None: ``engine_gpus`` if the cluster has any.
    num_gpus: float | None
    engine_gpus: int
    timeout_s: float
    runtime_env: Mapping[str, Any] | None


@dataclass(frozen=True)
class Start:
    """To the driver: start a task that runs the explorer of a place."""

    task: int
    slot: int
    #: Where the trainer listens.
    address: str
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class Cancel:
    """To the driver: kill the process of a task, if it still runs."""

    task: int


@dataclass(frozen=True)
class Reserved:
    """From the driver: everything is reserved, and nodes reach this one at ``address``."""

    address: str


@dataclass(frozen=True)
class Ended:
    """From the driver: a task has ended."""

    task: int
    #: For a message, such as "ended with status -9".
    how: str
    #: The end of the explorer's output and where the rest is, or the traceback of what could not run it.
    words: str
    #: Whether it ended by an exception, which another task would raise again.
    hopeless: bool = False


@dataclass(frozen=True)
class Broken:
    """From the driver, last: why it gives up."""

    error: Exception
