"""Messages between rank 0 and an explorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rft.channel import Failure
from lightning_rft.experience import Experience, GroupKey, Task, TensorInfo
from lightning_rft.explorer.partials import Part
from lightning_rft.settings import Sampling

__all__ = [
    *("Advanced", "Cancel", "Connect", "Died", "Ended", "Explore", "Explored", "Failed", "Load", "LoadFailed"),
    *("Loaded", "Prepare", "Sampled", "Scored", "Several", "Sleep", "Slept", "Started", "Wake", "Woken"),
]


_SLOTS_PER_WAITING = 8


@dataclass(frozen=True)
class Prepare:
    """To an explorer, first of all: import what this engine needs."""

    engine: Any


@dataclass(frozen=True)
class Explore:
    """To an explorer: run every sample of a group."""

    run: int  # carried by answers, so that late ones of an earlier run are recognised
    key: GroupKey
    attempt: int  # counts how often the group was issued; carried by answers, too
    task: Task
    seeds: tuple[int, ...]  # one for each sample
    sampling: Sampling  # with nothing left out
    kept: tuple[Part, ...] = ()  # what an explorer that died had sampled, to go on with


@dataclass(frozen=True)
class Cancel:
    """To an explorer: forget one group of ``run``, or with ``key`` ``None`` all its work."""

    run: int
    key: GroupKey | None = None


@dataclass(frozen=True)
class Several:
    """To an explorer: these messages, in order, and no engine step between them."""

    messages: tuple[Any, ...]


@dataclass(frozen=True)
class Connect:
    """To an explorer: join a weight transport."""

    link: Any


@dataclass(frozen=True)
class Load:
    """To an explorer: receive ``version``, and say how it scores a text with it."""

    manifest: Sequence[TensorInfo]
    version: int
    text_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sleep:
    """To an explorer that has no work: have the engine sleep, at a level of :meth:`Engine.sleep`."""

    level: int


@dataclass(frozen=True)
class Wake:
    """To an explorer: have parts of its engine wake; a load wakes what still sleeps."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Started:
    """From an explorer: the engine is ready."""

    dtype: str
    world_size: int
    nccl: bool
    max_num_seqs: int
    ipc: bool = False

    @property
    def room(self) -> int:
        """How many samples to give it at the same time: some wait, so that no slot is empty for a round trip."""
        return self.max_num_seqs + self.max_num_seqs // _SLOTS_PER_WAITING


@dataclass(frozen=True)
class Loaded:
    """From an explorer: it computes with ``version`` now."""

    version: int


@dataclass(frozen=True)
class Scored:
    """From an explorer, before it samples with what it has loaded: how it scores the text; nothing if it simulates."""

    version: int
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Advanced:
    """From an explorer: its engine has made a step or owes nothing, and it answers. A hung one does not."""


@dataclass(frozen=True)
class Sampled:
    """From an explorer: what the samples of a group that takes long have sampled since the last one."""

    run: int
    key: GroupKey
    attempt: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Slept:
    """From an explorer: its engine sleeps."""


@dataclass(frozen=True)
class Woken:
    """From an explorer: these parts of its engine are awake."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """From an explorer: samples have left its engine, and others have room, before their groups are complete.

    A sample ends once, even if it is tried again since its reward raised.
    """

    run: int
    samples: Mapping[tuple[GroupKey, int], int]  # how many, by group and attempt


@dataclass(frozen=True)
class Explored:
    """From an explorer: a group with the samples that succeeded, and why the others did not, after every retry."""

    run: int
    key: GroupKey
    attempt: int
    task_id: str
    experiences: tuple[Experience, ...]
    failures: tuple[Failure, ...] = ()
    retried: int = 0


@dataclass(frozen=True)
class LoadFailed:
    """From an explorer: the transport broke off; it computes nothing until the next load succeeds."""

    version: int
    failure: Failure


@dataclass(frozen=True)
class Failed:
    """From an explorer: it cannot go on, and ends."""

    failure: Failure


@dataclass(frozen=True)
class Died:
    """In the place of a message: an explorer is gone, and another one will be started for it."""

    error: Exception
