"""A buffer as a table, for looking at what was explored and trained."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning_rft.buffer.codec import unpack
from lightning_rft.buffer.faults import opening_error, storage_errors
from lightning_rft.buffer.schema import check_format
from lightning_rft.errors import ConfigurationError

__all__ = ["connect", "read_buffer"]

_COLUMNS = (
    *("run", "incarnation", "batch", "slot", "round", "epoch", "task_id", "state", "step", "attempts", "error"),
    *("sample", "reward", "num_tokens", "finish_reason", "text", "oldest_version", "newest_version"),
)
_TOKENS = ("prompt_ids", "token_ids", "logprobs", "versions")


def read_buffer(path: str | Path, *, tokens: bool = True) -> Iterator[dict[str, Any]]:
    """One flat row per sample, of a run that has ended or goes on.

    The file is opened to read only, and all rows are as of the moment of the first. A run that goes on is neither held
    up nor disturbed; but its file grows until the last row is read, so read on. SQLite may leave two small files
    beside one that no run has open, named as it with ``-wal`` and ``-shm``.

    The columns: of the group ``run``, ``incarnation`` (the one that issued it last), ``batch``, ``slot``, ``round``
    (which of the tasks that the slot had), ``epoch``, ``task_id``, ``state``, ``step`` (the batch it was trained in, or
    the version at which it ended otherwise), ``attempts`` and ``error``; of the sample ``sample``, ``reward``,
    ``num_tokens``, ``finish_reason``, ``text``, ``oldest_version`` and ``newest_version``. A group without experiences
    is one row, with None for these.

    Args:
        path: The file.
        tokens: Whether to add ``prompt_ids``, ``token_ids``, ``logprobs`` and ``versions``. Each is a list with one
            list per turn, also where there is but one turn, so that all rows have the same types.

    Raises:
        ConfigurationError: There is no such file, or it is no buffer or one of another format.
        StorageError: The file is damaged.

    Example::

        frame = pandas.DataFrame(read_buffer("rft/buffer.sqlite", tokens=False))
        frame.groupby("step")["reward"].mean()

        table = pyarrow.Table.from_pylist(list(read_buffer("rft/buffer.sqlite")))
    """
    path = Path(path)
    columns = ", ".join(f"e.{name}" if name.endswith("_version") else name for name in _COLUMNS)
    with storage_errors(path), closing(connect(path)) as connection:
        rows = connection.execute(
            f"SELECT {columns}{', turns' if tokens else ''}"
            " FROM groups LEFT JOIN experiences e USING (run, batch, slot, round)"
            " ORDER BY run, batch, slot, round, sample"
        )
        for row in rows:
            flat = dict(zip(_COLUMNS, row, strict=False))
            if tokens:
                turns = None if row[-1] is None else unpack(row[-1])
                for name in _TOKENS:
                    flat[name] = None if turns is None else [list(getattr(turn, name)) for turn in turns]
            yield flat


def connect(path: Path) -> sqlite3.Connection:
    """Opens a buffer to read only; see :func:`read_buffer` for what that means, and for the errors."""
    if not path.is_file():
        raise ConfigurationError(f"there is no buffer {str(path)!r}: give the path of a run's buffer.sqlite")
    # To read beside a writer SQLite wants a small file of its own there. Where it cannot make one, nobody writes.
    still = not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists()
    uri = f"file:{quote(str(path.absolute()))}?mode=ro{'&immutable=1' if still else ''}"
    connection = None
    try:
        connection = sqlite3.connect(uri, uri=True)
        if not check_format(connection, path):
            raise ConfigurationError(f"buffer {str(path)!r} is empty: give the path of a run's buffer.sqlite")
        return connection
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise opening_error(path, error) from error
        raise
