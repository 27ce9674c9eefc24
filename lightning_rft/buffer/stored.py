"""Experience of an earlier run, to train on without any explorer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from lightning_rft.buffer.codec import from_row
from lightning_rft.buffer.faults import storage_errors
from lightning_rft.buffer.reader import connect
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group, GroupKey

__all__ = ["StoredExperience", "stored_keys"]

_KEYS = "run, batch, slot, round"


class StoredExperience:
    """The groups of a buffer's file as batches for the loader, epoch after epoch.

    Groups that were dropped, failed or filtered are left out. The file is open only while a batch is read.

    Args:
        path: The file.
        tasks_per_step: Groups of a batch; the last one of an epoch may have fewer.
        shuffle: Whether each epoch has an order of its own; else groups come as they were issued.
        seed: Seeds the order.
        version: Called for the number of batches trained so far.

    Raises:
        ConfigurationError: There is no such file, it is no buffer, or it holds no experience.
        StorageError: The file is damaged.
    """

    def __init__(
        self, path: str | Path, *, tasks_per_step: int, shuffle: bool, seed: int, version: Callable[[], int]
    ) -> None:
        self._path = Path(path)
        self._tasks_per_step = tasks_per_step
        self._shuffle = shuffle
        self._seed = seed
        self._version = version
        self._keys = stored_keys(self._path)
        if not self._keys:
            raise ConfigurationError(f"buffer={str(path)!r} holds no experience to train on: explore some first")

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._keys) // self._tasks_per_step)

    @property
    def version(self) -> int:
        """Batches trained so far, which is the batch that comes next."""
        return self._version()

    def wanted(self, batch: int) -> list[Group]:
        """Reads a batch; the same number always means the same groups."""
        epoch, index = divmod(batch, self.batches)
        order = list(range(len(self._keys)))
        if self._shuffle:
            random.Random(f"{self._seed} {epoch}").shuffle(order)
        start = index * self._tasks_per_step
        return self._read([self._keys[place] for place in order[start : start + self._tasks_per_step]])

    def _read(self, keys: Sequence[tuple[int, ...]]) -> list[Group]:
        groups = []
        with storage_errors(self._path), closing(connect(self._path)) as connection:
            for key in keys:
                where = "run = ? AND batch = ? AND slot = ? AND round = ?"
                (task_id,) = connection.execute(f"SELECT task_id FROM groups WHERE {where}", key).fetchone()
                rows = connection.execute(f"SELECT * FROM experiences WHERE {where} ORDER BY sample", key).fetchall()
                experiences = tuple(from_row(task_id, row[len(key) :]) for row in rows)
                groups.append(Group(GroupKey(key[1], key[2]), task_id, experiences))
        return groups


def stored_keys(path: Path) -> list[tuple[int, ...]]:
    """Run, batch, slot and round of every group of a file that can be trained on, of all its runs.

    Raises:
        ConfigurationError: There is no such file, or it is no buffer.
        StorageError: The file is damaged.
    """
    with storage_errors(path), closing(connect(path)) as connection:
        return connection.execute(
            f"SELECT DISTINCT {_KEYS} FROM groups JOIN experiences USING ({_KEYS})"
            f" WHERE state IN ('ready', 'leased', 'trained') ORDER BY {_KEYS}"
        ).fetchall()
