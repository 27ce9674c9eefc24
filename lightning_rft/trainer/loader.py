"""Loaders that feed Lightning's loops with experience.

They are plain iterables with a length: from any other Lightning fetches a batch ahead, before the weights that must
sample it exist.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from lightning_rft.experience import Group
from lightning_rft.trainer.limits import EpochProgress
from lightning_rft.trainer.ranks import Ranks

__all__ = ["BatchPart", "ExperienceLoader", "ExplorationLoader", "Source", "ValidationLoader"]


class Source(Protocol):
    """Source of batches: the run, or a buffer of stored experience."""

    @property
    def version(self) -> int:
        """Batches trained so far, which is the batch that comes next."""

    @property
    def on_policy(self) -> bool:
        """Whether every token of a batch is sampled with the weights that it trains."""

    def wanted(self, batch: int) -> list[Group]:
        """Waits for a batch and leases it."""


class BatchPart:
    """One item of the loader: one of the parts that a batch is trained in, with one optimizer step after the last.

    Not a dataclass on purpose: Lightning would take it apart to move its fields to a device.
    """

    def __init__(
        self,
        batch: int,
        groups: Sequence[Group],
        *,
        part: int = 0,
        parts: int = 1,
        max_new_tokens: int = 1,
        on_policy: bool = False,
        wait_seconds: float = 0.0,
        val_set: str = "",
        samples: int = 1,
        ends: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        #: Index of the batch, which is also the version that is trained.
        self.batch = batch
        #: The groups of the whole batch, on rank 0; other ranks get the turns that they train, when that is known. What
        #: is only explored is dealt to the ranks.
        self.groups = list(groups)
        #: The ranks that train the batch together.
        self.ranks = ranks or Ranks()
        #: Index of this part among the parts.
        self.part = part
        self.parts = parts
        #: Maximum tokens of a call of the policy.
        self.max_new_tokens = max_new_tokens
        self.on_policy = on_policy
        #: Seconds that the trainer waited for the batch.
        self.wait_seconds = wait_seconds
        #: In validation, where a set of held-out tasks is what comes in parts: its name, the samples of each task, and
        #: whether this part is the last of all sets.
        self.val_set = val_set
        self.samples = samples
        self.ends = ends

    @property
    def first(self) -> bool:
        """Whether the batch begins with this part."""
        return self.part == 0

    @property
    def last(self) -> bool:
        """Whether this part completes the batch, so that the optimizer steps after it."""
        return self.part == self.parts - 1


class ExperienceLoader:
    """One epoch of ``batches`` batches, each in ``accumulate`` items on each rank.

    Where limits leave ``items`` that end within a batch, it is made into as many items as are left, so that it is still
    trained whole. ``source`` is called on rank 0; ``progress`` is told when the epoch begins, and says how far it is.
    """

    def __init__(
        self,
        source: Callable[[], Source],
        ranks: Ranks,
        *,
        batches: int,
        accumulate: int,
        items: int,
        max_new_tokens: int,
        progress: EpochProgress,
    ) -> None:
        self._source = source
        self._ranks = ranks
        self._batches = batches
        self._accumulate = accumulate
        self._items = items
        self._max_new_tokens = max_new_tokens
        self._progress = progress
        self._done = 0  # items that were handed out, of which the last may fail
        self._resumed = 0

    def state_dict(self) -> dict[str, Any]:
        """Progress of the epoch."""
        return {"done": self._progress.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next epoch the rest of the one that was saved."""
        self._resumed = state_dict["done"]

    def __len__(self) -> int:
        # before limits, which Lightning applies
        return self._batches * self._accumulate

    def __iter__(self) -> Iterator[BatchPart]:
        self._done, self._resumed = self._resumed % max(1, self._items), 0
        # Lightning asks for the first iterator before the run begins
        return self._batches_left()

    def _batches_left(self) -> Iterator[BatchPart]:
        self._progress.begin()
        ranks, left = self._ranks, self._items - self._done
        while left > 0:
            began = time.perf_counter()
            batch, on_policy, groups = ranks.scatter("a batch of experience", self._next)
            waited = time.perf_counter() - began
            # a checkpoint from the middle of a batch has lost half of its gradient, and Lightning steps where it did
            parts = min(self._accumulate - self._done % self._accumulate, left)
            for part in range(parts):
                self._done += 1
                yield BatchPart(
                    batch,
                    groups,
                    part=part,
                    parts=parts,
                    max_new_tokens=self._max_new_tokens,
                    on_policy=on_policy,
                    wait_seconds=waited,
                    ranks=ranks,
                )
            left -= parts

    def _next(self) -> list[tuple[int, bool, list[Group]]]:
        source = self._source()
        groups = source.wanted(source.version)
        others: list[list[Group]] = [[]] * (self._ranks.count - 1)
        return [(source.version, source.on_policy, of_rank) for of_rank in (groups, *others)]


class ExplorationLoader:
    """Batches that are explored and not trained: ``kept`` waits on rank 0 for the next, by its index in the run."""

    def __init__(self, kept: Callable[[int], tuple[int, list[Group]]], ranks: Ranks, batches: int) -> None:
        self._kept = kept
        self._ranks = ranks
        self._batches = batches

    def __len__(self) -> int:
        # before limits, which Lightning applies
        return self._batches

    def __iter__(self) -> Iterator[BatchPart]:
        ranks = self._ranks
        for index in range(self._batches):
            yield BatchPart(*ranks.scatter(f"explored batch {index}", partial(self._dealt, index)))

    def _dealt(self, index: int) -> list[tuple[int, list[Group]]]:
        batch, groups = self._kept(index)
        return [(batch, groups[rank :: self._ranks.count]) for rank in range(self._ranks.count)]


class ValidationLoader:
    """Answers to a set of held-out tasks, ``chunk`` groups an item, each of ``samples`` unless some failed.

    ``begin`` has the tasks explored and returns their indices, ``explored`` waits for the group of one; ``size`` is
    their number before limits. With the set of which it is said, all validation ``ends``.
    """

    def __init__(
        self,
        begin: Callable[[], range],
        explored: Callable[[int], Group],
        size: int,
        chunk: int,
        *,
        val_set: str = "",
        samples: int = 1,
        ends: bool = True,
    ) -> None:
        self._begin = begin
        self._explored = explored
        self._size = size
        self._chunk = chunk
        self._val_set = val_set
        self._samples = samples
        self._ends = ends

    def __len__(self) -> int:
        return -(-self._size // self._chunk)

    def __iter__(self) -> Iterator[BatchPart]:
        tasks = self._begin()
        parts = -(-len(tasks) // self._chunk)
        for part in range(parts):
            some = tasks[part * self._chunk : (part + 1) * self._chunk]
            yield BatchPart(
                part,
                [self._explored(task) for task in some],
                part=part,
                parts=parts,
                val_set=self._val_set,
                samples=self._samples,
                ends=self._ends and part == parts - 1,
            )
