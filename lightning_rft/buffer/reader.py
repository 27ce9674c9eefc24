"""Read-only access to a buffer: a table of samples, and batches to train on without explorers."""

from __future__ import annotations

import os
import random
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning_rft.buffer.codec import COLUMNS, to_group, unpack
from lightning_rft.buffer.database import opening_error, storage_errors
from lightning_rft.buffer.resume import ROUND
from lightning_rft.buffer.schema import check_format, show_as_new
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group, GroupKey

__all__ = ["StoredExperience", "read_buffer", "read_prompts", "read_pruned", "stored_keys"]

_COLUMNS = (
    *("run", "incarnation", "batch", "slot", "round", "epoch", "task_id", "state", "step", "attempts", "error"),
    *(
        "sample",
        "reward",
        "rewards",
        "metrics",
        "num_tokens",
        "finish_reason",
        "text",
        "oldest_version",
        "newest_version",
    ),
)
_ARRAYS = ("prompt_ids", "token_ids", "logprobs", "versions")
_KEYS = "run, batch, slot, round"


def read_buffer(path: str | Path, *, tokens: bool = True) -> Iterator[dict[str, Any]]:
    """Reads a buffer as one flat row per sample, after its run or during it.

    All rows are as of the moment of the first. A run in progress is not disturbed, but its file cannot shrink until the
    last row is read. SQLite may leave two small files beside the buffer, which end in ``-wal`` and ``-shm``.

    Columns of the group: ``run``, ``incarnation`` (the last that issued it), ``batch``, ``slot``, ``round`` (counts the
    tasks of the slot), ``epoch`` (the pass through the tasks, or the position in a source without a length),
    ``task_id``, ``state``, ``step`` (the batch that trained it, or the version at which it failed or was filtered),
    ``attempts`` and ``error``. Columns of the sample: ``sample``, ``reward``, ``rewards`` (its parts by name, as JSON),
    ``metrics`` (of the workflow, by name, as JSON), ``num_tokens``, ``finish_reason``, ``text``, ``oldest_version`` and
    ``newest_version``; a group without samples is one row, with None for these. What ``Buffer(keep=...)`` had deleted
    has no rows; a report counts it.

    Args:
        path: The file.
        tokens: Whether to add ``prompt_ids``, ``token_ids``, ``logprobs`` and ``versions``, with a list per turn, and
            ``temperature``, with a number per turn.

    Raises:
        ConfigurationError: There is no such file, or it is no buffer or one of another format.
        StorageError: The file is damaged.

    Example::

        frame = pandas.DataFrame(read_buffer("rft/buffer.sqlite", tokens=False))
        frame.groupby("step")["reward"].mean()

        table = pyarrow.Table.from_pylist(list(read_buffer("rft/buffer.sqlite")))
    """
    columns = ", ".join(f"e.{name}" if name.endswith("_version") else name for name in _COLUMNS)
    with _connected(Path(path)) as connection:
        rows = connection.execute(
            f"SELECT {columns}{', turns' if tokens else ''}"
            " FROM groups LEFT JOIN experiences e USING (run, batch, slot, round)"
            " ORDER BY run, batch, slot, round, sample"
        )
        for row in rows:
            flat = dict(zip(_COLUMNS, row, strict=False))
            if tokens:
                turns = (
                    None
                    if row[-1] is None
                    else unpack(row[-1], *(flat[name] for name in ("sample", "reward", "rewards")))
                )
                for name in _ARRAYS:
                    flat[name] = None if turns is None else [getattr(turn, name).tolist() for turn in turns]
                flat["temperature"] = None if turns is None else [turn.temperature for turn in turns]
            yield flat


def read_prompts(path: Path, keys: Iterable[tuple[int, ...]]) -> Iterator[list[int] | None]:
    """The token ids that the last call of the policy read in samples, each by run, batch, slot, round and sample.

    None stands for a sample that the file holds no more.
    """
    with _connected(path) as connection:
        for key in keys:
            row = connection.execute(
                f"SELECT turns, sample, reward, rewards FROM experiences WHERE {ROUND} AND sample = ?", key
            ).fetchone()
            yield None if row is None else unpack(*row)[-1].prompt_ids.tolist()


def read_pruned(path: Path) -> list[tuple[int, int, int, int]]:
    """Runs of which groups were deleted: the run, the batch before which they are, and how many groups and samples."""
    with _connected(path) as connection:
        if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'pruned'").fetchone()[0]:
            return []  # of an earlier lightning_rft
        return connection.execute("SELECT run, before, groups, samples FROM pruned ORDER BY run").fetchall()


class StoredExperience:
    """The groups of a buffer's file that can be trained, as batches for the loader, epoch after epoch.

    ``version`` returns the number of batches trained so far.
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
        self._order: tuple[int, Sequence[int]] = -1, ()  # of the groups in an epoch, by its number
        #: How many batches are trained again and again; None for all.
        self.repeated: int | None = None
        if not self._keys:
            raise ConfigurationError(f"buffer={str(path)!r} holds no experience to train on: explore some first")

    @property
    def batches(self) -> int:
        """Batches per epoch; the last may have fewer groups."""
        return -(-len(self._keys) // self._tasks_per_step)

    @property
    def version(self) -> int:
        """Batches trained so far."""
        return self._version()

    @property
    def on_policy(self) -> bool:
        """False: another run sampled it."""
        return False

    def wanted(self, batch: int) -> list[Group]:
        """Reads a batch; a number always means the same groups."""
        epoch, index = divmod(batch % self.repeated if self.repeated else batch, self.batches)
        if self._order[0] != epoch:
            self._order = epoch, self._shuffled(epoch)
        start = index * self._tasks_per_step
        places = self._order[1][start : start + self._tasks_per_step]
        return self._read([self._keys[place] for place in places])

    def _shuffled(self, epoch: int) -> Sequence[int]:
        order = array("q", range(len(self._keys)))
        if self._shuffle:
            random.Random(f"{self._seed} {epoch}").shuffle(order)
        return order

    def _read(self, keys: Sequence[tuple[int, ...]]) -> list[Group]:
        groups = []
        with _connected(self._path) as connection:
            for key in keys:
                task_id, samples = connection.execute(
                    f"SELECT task_id, samples FROM groups WHERE {ROUND}", key
                ).fetchone()
                rows = connection.execute(f"SELECT {COLUMNS} FROM experiences WHERE {ROUND} ORDER BY sample", key)
                groups.append(to_group(GroupKey(key[1], key[2]), task_id, rows, samples))
        return groups


def stored_keys(path: Path) -> list[tuple[int, ...]]:
    """Run, batch, slot and round of every group in a file that can be trained."""
    with _connected(path) as connection:
        return connection.execute(
            f"SELECT {_KEYS} FROM groups"
            f" WHERE state IN ('ready', 'leased', 'trained') AND samples IS NOT NULL ORDER BY {_KEYS}"
        ).fetchall()


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    if not path.is_file():
        raise ConfigurationError(f"there is no buffer {str(path)!r}: give the path of a run's buffer.sqlite")
    # SQLite reads beside a writer with the help of a small file. Where it cannot create one, nobody writes.
    still = not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists()
    uri = f"file:{quote(str(path.absolute()))}?mode=ro{'&immutable=1' if still else ''}"
    with ExitStack() as resources:
        try:
            connection = resources.enter_context(closing(sqlite3.connect(uri, uri=True)))
            filled = check_format(connection, path)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise opening_error(path, error) from error
        if not filled:
            raise ConfigurationError(f"buffer {str(path)!r} is empty: give the path of a run's buffer.sqlite")
        with storage_errors(path):
            show_as_new(connection)
            yield connection
