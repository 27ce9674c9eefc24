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
from lightning_rft.trainer.ranks import Ranks

__all__ = ["ExperienceLoader", "ExplorationLoader", "MicroBatch", "Source", "ValidationLoader", "split"]


class Source(Protocol):
    """Source of batches: the run, or a buffer of stored experience."""

    @property
    def version(self) -> int:
        """Batches trained so far, which is the batch that comes next."""

    def wanted(self, batch: int) -> list[Group]:
        """Waits for a batch and leases it."""


class MicroBatch:
    """One item of the loader: a share of a batch, which may have no groups.

    Not a dataclass on purpose: Lightning would take it apart to move its fields to a device.
    """

    def __init__(
        self, batch: int, groups: Sequence[Group], *, last: bool, batch_tokens: int, wait_seconds: float = 0.0
    ) -> None:
        #: Index of the batch, which is also the version that is trained.
        self.batch = batch
        self.groups = list(groups)
        #: Whether this share completes the batch, so that the optimizer steps after it.
        self.last = last
        #: Sampled tokens of the whole batch, to normalise by.
        self.batch_tokens = batch_tokens
        #: Seconds that the trainer waited for the batch.
        self.wait_seconds = wait_seconds


def split(groups: Sequence[Group], parts: int) -> list[list[Group]]:
    """Deals groups, the largest first, into ``parts`` shares with about as many sampled tokens.

    Example:
        >>> from lightning_rft.experience import Experience, GroupKey, Turn
        >>> def group(slot, n):
        ...     turn = Turn((1,), (2,) * n, (0.0,) * n, (0,) * n, "stop")
        ...     return Group(GroupKey(0, slot), str(slot), (Experience(str(slot), 0, (turn,), 1.0),))
        >>> [[g.key.slot for g in share] for share in split([group(0, 5), group(1, 9), group(2, 3)], 2)]
        [[1], [0, 2]]
    """
    shares: list[list[Group]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for group in sorted(groups, key=lambda group: (-group.num_tokens, group.key)):
        lightest = tokens.index(min(tokens))
        shares[lightest].append(group)
        tokens[lightest] += group.num_tokens
    return shares


class ExperienceLoader:
    """One epoch of ``batches`` batches, each in ``accumulate`` items on each rank.

    Where limits leave ``items`` that end within a batch, it is made into as many items as are left, so that it is still
    trained whole. ``source`` is called on rank 0, ``done`` for a checkpoint: how many items of the epoch are trained.
    """

    def __init__(
        self,
        source: Callable[[], Source],
        ranks: Ranks,
        *,
        batches: int,
        accumulate: int,
        items: int,
        done: Callable[[], int],
    ) -> None:
        self._source = source
        self._ranks = ranks
        self._batches = batches
        self._accumulate = accumulate
        self._items = items
        self._trained = done
        self._done = 0  # items that were handed out, of which the last may fail
        self._resumed = 0

    def state_dict(self) -> dict[str, Any]:
        """Progress of the epoch."""
        return {"done": self._trained()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next epoch the rest of the one that was saved."""
        self._resumed = state_dict["done"]

    def __len__(self) -> int:
        # before limits, which Lightning applies
        return self._batches * self._accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        self._done, self._resumed = self._resumed % max(1, self._items), 0
        # Lightning asks for the first iterator before the run begins
        return self._batches_left()

    def _batches_left(self) -> Iterator[MicroBatch]:
        ranks, left = self._ranks, self._items - self._done
        while left > 0:
            began = time.perf_counter()
            batch, groups = ranks.agree("a batch of experience", self._next)
            waited = time.perf_counter() - began
            tokens = sum(group.num_tokens for group in groups)
            # a checkpoint from the middle of a batch has lost half of its gradient, and Lightning steps where it did
            parts = min(self._accumulate - self._done % self._accumulate, left)
            shares = split(groups, parts * ranks.count)[ranks.rank :: ranks.count]
            for index, share in enumerate(shares, start=1):
                last = index == len(shares)
                self._done += 1
                yield MicroBatch(batch, share, last=last, batch_tokens=tokens, wait_seconds=waited if last else 0.0)
            left -= len(shares)

    def _next(self) -> tuple[int, list[Group]]:
        source = self._source()
        return source.version, source.wanted(source.version)


class ExplorationLoader:
    """Batches that are explored and not trained: ``kept`` waits on rank 0 for the next, by its index in the run."""

    def __init__(self, kept: Callable[[int], tuple[int, list[Group]]], ranks: Ranks, batches: int) -> None:
        self._kept = kept
        self._ranks = ranks
        self._batches = batches

    def __len__(self) -> int:
        # before limits, which Lightning applies
        return self._batches

    def __iter__(self) -> Iterator[MicroBatch]:
        ranks = self._ranks
        for index in range(self._batches):
            batch, groups = ranks.agree(f"explored batch {index}", partial(self._kept, index))
            tokens = sum(group.num_tokens for group in groups)
            yield MicroBatch(batch, split(groups, ranks.count)[ranks.rank], last=True, batch_tokens=tokens)


class ValidationLoader:
    """Answers to held-out tasks, ``chunk`` groups an item.

    ``begin`` has all of them explored together and returns their number, ``explored`` waits for that of an index;
    ``size`` is their number before limits.
    """

    def __init__(self, begin: Callable[[], int], explored: Callable[[int], Group], size: int, chunk: int) -> None:
        self._begin = begin
        self._explored = explored
        self._size = size
        self._chunk = chunk

    def __len__(self) -> int:
        return -(-self._size // self._chunk)

    def __iter__(self) -> Iterator[MicroBatch]:
        count = self._begin()
        for index, start in enumerate(range(0, count, self._chunk)):
            groups = [self._explored(task) for task in range(start, min(start + self._chunk, count))]
            yield MicroBatch(index, groups, last=True, batch_tokens=sum(group.num_tokens for group in groups))
