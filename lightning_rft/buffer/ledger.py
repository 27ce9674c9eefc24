"""The buffer: a SQLite ledger of every group, from issue to training.

One file tells what became of each group, in a form that any SQLite reader can query while the run goes on::

    sqlite3 buffer.sqlite "SELECT state, count(*) FROM groups GROUP BY state"

The file is in write-ahead mode with ``synchronous=NORMAL``: a change that returned survives the death of the process,
while a power cut may cost the last moments, but never the file.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import Experience, Group, GroupKey

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Ledger", "State"]

FORMAT_VERSION = 1
APPLICATION_ID = 0x52465442  # "RFTB": tells our files from those of other programs that also count versions from 1


class State(str, Enum):
    """Where a group stands; ``trained``, ``filtered``, ``dropped`` and ``failed`` end it unless it is issued again."""

    ISSUED = "issued"
    READY = "ready"
    LEASED = "leased"
    TRAINED = "trained"
    FILTERED = "filtered"
    DROPPED = "dropped"
    FAILED = "failed"


# Blobs sit in an ordinary table, last in the row: WITHOUT ROWID suits small rows only, and readers of the other
# columns then never touch the pages of a blob. `step` counts the trained batches of an incarnation from 0.
_SCHEMA = f"""
CREATE TABLE incarnations (number INTEGER PRIMARY KEY, started REAL NOT NULL);
CREATE TABLE groups (
    incarnation INTEGER NOT NULL REFERENCES incarnations (number),
    batch INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    task_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ({", ".join(repr(state.value) for state in State)})),
    explorer INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 1,
    oldest_version INTEGER,
    error TEXT,
    step INTEGER,
    PRIMARY KEY (incarnation, batch, slot)
) WITHOUT ROWID;
CREATE INDEX groups_leased ON groups (incarnation) WHERE state = 'leased';
CREATE INDEX groups_by_step ON groups (incarnation, step) WHERE step IS NOT NULL;
CREATE TABLE experiences (
    incarnation INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    sample INTEGER NOT NULL,
    reward REAL NOT NULL,
    num_tokens INTEGER NOT NULL,
    oldest_version INTEGER NOT NULL,
    finish_reason TEXT NOT NULL,
    blob BLOB NOT NULL,
    PRIMARY KEY (incarnation, batch, slot, sample)
);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT_VERSION};
"""


class Ledger:
    """Every group of a run and its experiences. Made by :meth:`open`.

    Each method is one transaction: it happens whole or, if it raises, not at all. Threads may share a ledger if the
    caller lets in one at a time; a second process cannot open the file.

    Example:
        >>> with Ledger.open(":memory:") as ledger:
        ...     ledger.begin_incarnation()
        ...     ledger.issue(GroupKey(batch=0, slot=0), task_id="7", epoch=0, explorer=0)
        ...     ledger.counts()[State.ISSUED]
        1
        1
    """

    def __init__(self, connection: sqlite3.Connection, resources: ExitStack) -> None:
        self._connection = connection
        self._resources = resources
        self._incarnation: int = connection.execute("SELECT coalesce(max(number), 0) FROM incarnations").fetchone()[0]
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Experience)

    @classmethod
    def open(cls, path: str | Path) -> Ledger:
        """Open the file, or create it and its folder; hold it until :meth:`close`.

        Args:
            path: The file, or ``":memory:"`` for a ledger that dies with the process.

        Raises:
            ConfigurationError: Another run holds the file, it is no ledger or one of another format, or it cannot be
                opened at all.
        """
        with ExitStack() as resources:
            if str(path) != ":memory:":
                _lock(Path(path), resources)
            try:
                # Autocommit: transactions begin and end where this file says so, not where sqlite3 guesses.
                connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                resources.callback(connection.close)
                _prepare(connection, path)
            except sqlite3.DatabaseError as error:
                raise ConfigurationError(
                    f"buffer {str(path)!r} cannot be opened as a SQLite file ({error}): set `buffer` to the path of "
                    "a new file or of an earlier run's buffer"
                ) from error
            return cls(connection, resources.pop_all())

    def close(self) -> None:
        """Close the file and let other runs open it. Closing twice is harmless."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def begin_incarnation(self) -> int:
        """Start the next incarnation of the run: 1 for a fresh file. All other methods act on the latest.

        Groups that older incarnations left issued, ready or leased are marked dropped; their experiences stay.
        """
        with self._transaction():
            number = self._incarnation + 1
            self._connection.execute("INSERT INTO incarnations VALUES (?, ?)", (number, time.time()))
            self._connection.execute(
                "UPDATE groups SET state = 'dropped' WHERE incarnation < ? AND state IN ('issued', 'ready', 'leased')",
                (number,),
            )
        self._incarnation = number
        return number

    def issue(self, key: GroupKey, task_id: str, epoch: int, explorer: int) -> None:
        """Note that an explorer was given a group: a new one, or again one that is issued, dropped or failed.

        Each further issue counts as one more attempt and forgets what the one before left behind.

        Raises:
            ScheduleError: The group is ready, leased, trained or filtered, or no incarnation has begun.
        """
        if not self._incarnation:
            raise ScheduleError(f"group {tuple(key)} cannot be issued: call begin_incarnation first")
        with self._transaction():
            old = self._check(key, State.ISSUED, None, State.ISSUED, State.DROPPED, State.FAILED)
            if old is None:
                self._connection.execute(
                    "INSERT INTO groups (incarnation, batch, slot, epoch, task_id, state, explorer)"
                    " VALUES (?, ?, ?, ?, ?, 'issued', ?)",
                    (self._incarnation, *key, epoch, task_id, explorer),
                )
                return
            self._connection.execute(
                "UPDATE groups SET state = 'issued', epoch = ?, task_id = ?, explorer = ?, attempts = attempts + 1,"
                " oldest_version = NULL, error = NULL WHERE incarnation = ? AND batch = ? AND slot = ?",
                (epoch, task_id, explorer, self._incarnation, *key),
            )
            self._connection.execute(
                "DELETE FROM experiences WHERE incarnation = ? AND batch = ? AND slot = ?", (self._incarnation, *key)
            )

    def ready(self, group: Group) -> None:
        """Store a group that an explorer finished.

        Raises:
            ScheduleError: The group is not issued, was issued for another task, or has no experiences.
        """
        key = group.key
        if not group.experiences:
            raise ScheduleError(f"group {tuple(key)} cannot be ready: it has no experiences")
        versions = [experience.oldest_version for experience in group.experiences]  # walks every token: once
        rows = [
            (
                self._incarnation,
                *key,
                experience.sample,
                experience.reward,
                experience.num_tokens,
                version,
                experience.turns[-1].finish_reason,
                self._encoder.encode(experience),
            )
            for experience, version in zip(group.experiences, versions, strict=True)
        ]
        with self._transaction():
            self._check(key, State.READY, State.ISSUED)
            # A late answer to the task that this group had before it was issued again must not pass as the new one's.
            changed = self._connection.execute(
                "UPDATE groups SET state = 'ready', oldest_version = ?"
                " WHERE incarnation = ? AND batch = ? AND slot = ? AND task_id = ?",
                (min(versions), self._incarnation, *key, group.task_id),
            ).rowcount
            if not changed:
                raise ScheduleError(
                    f"group {tuple(key)} cannot be ready: issued for another task than {group.task_id!r}"
                )
            self._connection.executemany("INSERT INTO experiences VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def lease(self, keys: Sequence[GroupKey]) -> list[Group]:
        """Take ready groups, in the order of ``keys``, experiences in sample order.

        Raises:
            ScheduleError: One of them is not ready.
        """
        with self._transaction():
            groups = []
            for key in keys:
                self._check(key, State.LEASED, State.READY)
                rows = self._connection.execute(
                    "SELECT task_id, blob FROM groups JOIN experiences USING (incarnation, batch, slot)"
                    " WHERE incarnation = ? AND batch = ? AND slot = ? ORDER BY sample",
                    (self._incarnation, *key),
                ).fetchall()
                self._set(key, State.LEASED)
                groups.append(Group(key, rows[0][0], tuple(self._decoder.decode(blob) for _, blob in rows)))
            return groups

    def release(self) -> None:
        """Give back what is leased: it is ready again. Nothing leased is fine."""
        with self._transaction():
            self._move(State.LEASED, State.READY)

    def trained(self) -> None:
        """Note that what is leased went into the next gradient step. Its experiences stay.

        Raises:
            ScheduleError: Nothing is leased.
        """
        with self._transaction():
            (step,) = self._connection.execute(
                "SELECT coalesce(max(step), -1) + 1 FROM groups WHERE incarnation = ? AND step IS NOT NULL",
                (self._incarnation,),
            ).fetchone()
            if not self._move(State.LEASED, State.TRAINED, step):
                raise ScheduleError("a batch cannot go to trained: no group is leased")

    def failed(self, key: GroupKey, error: str) -> None:
        """Note that an issued group ended in an error.

        Raises:
            ScheduleError: The group is not issued.
        """
        with self._transaction():
            self._check(key, State.FAILED, State.ISSUED)
            self._set(key, State.FAILED, error)

    def dropped(self, key: GroupKey) -> None:
        """Note that an issued, ready or leased group will not be trained as it is; it may be issued again.

        Raises:
            ScheduleError: The group is in another state.
        """
        with self._transaction():
            self._check(key, State.DROPPED, State.ISSUED, State.READY, State.LEASED)
            self._set(key, State.DROPPED)

    def counts(self) -> dict[State, int]:
        """How many groups of this incarnation are in each state, zeros included."""
        rows = self._connection.execute(
            "SELECT state, count(*) FROM groups WHERE incarnation = ? GROUP BY state", (self._incarnation,)
        )
        found = dict(rows.fetchall())
        return {state: found.get(state.value, 0) for state in State}

    def trained_tasks(self, epoch: int | None = None) -> list[str]:
        """Ids of the tasks that this incarnation trained, in training order; of one epoch if given."""
        rows = self._connection.execute(
            "SELECT task_id FROM groups WHERE incarnation = ? AND step IS NOT NULL AND epoch = coalesce(?, epoch)"
            " ORDER BY step, batch, slot",
            (self._incarnation, epoch),
        )
        return [task_id for (task_id,) in rows]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # SQLite itself rolls back on some errors (a full disk); asking again would hide the real one.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _check(self, key: GroupKey, new: State, *legal: State | None) -> State | None:
        """Return the state that a group is in, None if it was never issued; raise if it may not go to ``new``."""
        row = self._connection.execute(
            "SELECT state FROM groups WHERE incarnation = ? AND batch = ? AND slot = ?", (self._incarnation, *key)
        ).fetchone()
        old = State(row[0]) if row else None
        if old not in legal:
            name = old.value if old else "never issued"
            raise ScheduleError(f"group {tuple(key)} of incarnation {self._incarnation} is {name}: not to {new.value}")
        return old

    def _set(self, key: GroupKey, state: State, error: str | None = None) -> None:
        self._connection.execute(
            "UPDATE groups SET state = ?, error = ? WHERE incarnation = ? AND batch = ? AND slot = ?",
            (state.value, error, self._incarnation, *key),
        )

    def _move(self, old: State, new: State, step: int | None = None) -> int:
        return self._connection.execute(
            "UPDATE groups SET state = ?, step = ? WHERE incarnation = ? AND state = ?",
            (new.value, step, self._incarnation, old.value),
        ).rowcount


def _lock(path: Path, resources: ExitStack) -> None:
    """Hold ``<path>.lock`` until ``resources`` is closed. The file stays: removing it would race with its next owner.

    The lock falls with the process, however it dies.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigurationError(
            f"buffer {str(path)!r} cannot be opened ({error}): set `buffer` to a path that can be written"
        ) from error
    resources.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(file, 32, 0).decode(errors="replace").strip()
        raise ConfigurationError(
            f"buffer {str(path)!r} is in use by another run (process {owner or 'unknown'}): wait until it ends, "
            "or set `buffer` to another path"
        ) from error
    # Unlocked by name, not only closed: a forked child may still have the file open.
    resources.callback(fcntl.flock, file, fcntl.LOCK_UN)
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)


def _prepare(connection: sqlite3.Connection, path: str | Path) -> None:
    """Check the format before anything is written, so that a file which is not ours stays as it was."""
    application: int = connection.execute("PRAGMA application_id").fetchone()[0]
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    fresh = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if not fresh and application != APPLICATION_ID:
        raise ConfigurationError(
            f"buffer {str(path)!r} is a SQLite file of another program: set `buffer` to the path of a new file or of "
            "an earlier run's buffer"
        )
    if not fresh and version != FORMAT_VERSION:
        raise ConfigurationError(
            f"buffer {str(path)!r} has format version {version}, this lightning_rft reads {FORMAT_VERSION}: set "
            "`buffer` to the path of a new file, or use the lightning_rft that wrote this one"
        )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    if fresh:
        connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
