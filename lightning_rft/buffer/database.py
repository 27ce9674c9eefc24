"""The SQLite file of a buffer: on a local disk, held by one process, changed in whole transactions."""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from lightning_rft.buffer.schema import DAMAGED, prepare
from lightning_rft.errors import ConfigurationError, RFTError, StorageError

__all__ = ["File", "check_filesystem", "filesystem", "opening_error", "storage_errors"]

_MOUNTS = Path("/proc/self/mountinfo")
# SQLite's log is shared memory of one machine's processes, and locks on these are unreliable.
_NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs"),
    *("lustre", "ceph", "beegfs", "gpfs", "glusterfs", "fuse.glusterfs"),
)
_FULL = "free space on its disk, then resume with `ckpt_path`"
_OTHER = "see that its disk works and can be written, then resume with `ckpt_path`, or set `buffer` to a new path"
_NO_BUFFER = ("not a database", "unable to open", "readonly", "locked")


class File:
    """A SQLite file, created with its folder; every method raises StorageError if the disk fails."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with ExitStack() as resources:
            if str(path) != ":memory:":
                check_filesystem(Path(path))
                _create_and_lock(Path(path), resources)
            try:
                # Autocommit: transactions begin and end where this file says so, not where sqlite3 guesses.
                self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                resources.callback(lambda: self.connection.close())
                prepare(self.connection, path)
                self.id: str = self.connection.execute("SELECT id FROM identity").fetchone()[0]
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                raise opening_error(path, error) from error
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Unlocks the file; safe to call twice."""
        self._resources.close()

    @contextmanager
    def transaction(self) -> Iterator[Self]:
        """Commits what is executed inside, or nothing of it if anything raises; a nested one joins the outer."""
        nested = self.connection.in_transaction  # a name, or mypy takes it for false from here on
        if nested:
            yield self
            return
        with storage_errors(self.path):
            try:
                # Within the try: after a Ctrl+C as this returns, everything else would join a transaction that nobody
                # commits.
                self.connection.execute("BEGIN IMMEDIATE")
                yield self
                self.connection.execute("COMMIT")
            except BaseException:
                # SQLite itself rolls back on some errors (a full disk); asking again would hide the real one.
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Runs one statement of a transaction."""
        return self.connection.execute(statement, values)

    def insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Inserts one or more rows into a table, which may name its columns, as part of a transaction."""
        self.connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    def ask(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query outside of a transaction."""
        with storage_errors(self.path):
            return self.connection.execute(question, values).fetchall()


def filesystem(path: Path, mounts: str) -> str | None:
    """The filesystem type of a resolved path, from the text of ``/proc/self/mountinfo``; None if unknown.

    >>> filesystem(Path("/data/run"), "23 22 0:21 / /data rw,relatime - nfs4 host:/data rw")
    'nfs4'
    """
    found, depth = None, -1
    for line in mounts.splitlines():
        left, dash, right = line.partition(" - ")
        fields = left.split(" ")
        if not dash or len(fields) < 5:
            continue
        # Blanks and the like are written as three octal digits.
        mount = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        # The last of equals: it was mounted over the others.
        if path.is_relative_to(mount) and len(mount.parts) >= depth:
            found, depth = right.split(" ")[0], len(mount.parts)
    return found


def check_filesystem(path: Path) -> None:
    """Refuses a path on a network filesystem, where mounts are listed."""
    if not _MOUNTS.exists():
        return
    kind = filesystem(path.resolve(), _MOUNTS.read_text(errors="surrogateescape"))
    if kind in _NETWORK:
        raise ConfigurationError(
            f"buffer {str(path)!r} is on a network filesystem ({kind}), where SQLite files get damaged: set `buffer` "
            "to a path on a local disk"
        )


def _create_and_lock(path: Path, resources: ExitStack) -> None:
    """Creates file and folder for this user alone, and holds ``<path>.lock`` until ``resources`` is closed.

    The lock falls with the process, however it dies; its file stays, as removing it would race with its next owner.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its files beside this one the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"buffer {str(path)!r} cannot be opened ({error}): set `buffer` to a path that can be written"
        ) from error
    resources.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip()
        raise ConfigurationError(
            f"buffer {str(path)!r} is in use by another run (process {owner or 'unknown'}): wait until it ends, "
            "or set `buffer` to another path"
        ) from error
    # Unlocked by name, not only closed: a forked child may still have the file open.
    resources.callback(fcntl.flock, lock, fcntl.LOCK_UN)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turns errors of the disk into StorageError; errors of the caller pass unchanged."""
    try:
        yield
    except UnicodeDecodeError as error:  # in a message about a damaged file, or in a text
        raise _storage_error(path, error) from error
    except sqlite3.DatabaseError as error:
        # Its other subclasses mean a mistake of the caller, such as a closed connection.
        if type(error) not in (sqlite3.DatabaseError, sqlite3.OperationalError, sqlite3.InternalError):
            raise
        raise _storage_error(path, error) from error


def opening_error(path: str | Path, error: sqlite3.DatabaseError | UnicodeDecodeError) -> RFTError:
    """A ConfigurationError if the file is no buffer, else a StorageError."""
    if any(words in str(error) for words in _NO_BUFFER):
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
