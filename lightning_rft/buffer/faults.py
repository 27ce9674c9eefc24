"""What SQLite says of a sick disk, as errors that say what to do."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_rft.errors import ConfigurationError, RFTError, StorageError

__all__ = ["DAMAGED", "opening_error", "storage_errors"]

_FULL = "free space on its disk, then resume with `ckpt_path`"
DAMAGED = (
    "something has damaged the file; resume with `ckpt_path` and `buffer` set to a new path: what was trained is in "
    "the checkpoint, what was only stored is explored again"
)
_OTHER = "see that its disk works and can be written, then resume with `ckpt_path`, or set `buffer` to a new path"
_NO_LEDGER = ("not a database", "unable to open", "readonly", "locked")


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Raises what the disk did to a statement as a :class:`StorageError`; what a caller did wrong passes unchanged."""
    try:
        yield
    except UnicodeDecodeError as error:  # in a message about a damaged file, or in a text
        raise _storage_error(path, error) from error
    except sqlite3.DatabaseError as error:
        # Not its other subclasses: they tell of mistakes in the use, such as a closed connection.
        if type(error) not in (sqlite3.DatabaseError, sqlite3.OperationalError, sqlite3.InternalError):
            raise
        raise _storage_error(path, error) from error


def opening_error(path: str | Path, error: sqlite3.DatabaseError | UnicodeDecodeError) -> RFTError:
    """The error for a file that cannot be opened: of the setting if it is no buffer, of the disk otherwise."""
    if any(words in str(error) for words in _NO_LEDGER):
        return ConfigurationError(
            f"buffer {str(path)!r} cannot be opened as a SQLite file ({error}): set `buffer` to the path of a new file "
            "or of an earlier run's buffer"
        )
    return _storage_error(path, error)


def _storage_error(path: str | Path, error: Exception) -> StorageError:
    words = str(error)
    full, damaged = "full" in words, "malformed" in words or "decode" in words or "not a database" in words
    advice = _FULL if full else DAMAGED if damaged else _OTHER
    return StorageError(f"buffer {str(path)!r} cannot be read or written ({words}): {advice}")
