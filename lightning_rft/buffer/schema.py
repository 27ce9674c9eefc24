"""The tables of a buffer file, and its format version."""

from __future__ import annotations

import sqlite3
import uuid
from enum import StrEnum
from pathlib import Path

from lightning_rft.errors import ConfigurationError, StorageError

__all__ = ["DAMAGED", "State", "check_format", "prepare", "show_as_new"]

FORMAT_VERSION = 4
OLDEST_VERSION = 3  # that is brought up to date
APPLICATION_ID = 0x52465442  # "RFTB": tells our files from those of other programs

DAMAGED = (
    "something has damaged the file; resume with `ckpt_path` and `buffer` set to a new path: what was trained is in "
    "the checkpoint, what was only stored is explored again"
)


class State(StrEnum):
    """State of a group.

    Trained, filtered and failed end a task. A dropped group is issued again in the same round; the slot of a filtered
    or failed one gets another task, in the next round.
    """

    ISSUED = "issued"
    READY = "ready"
    LEASED = "leased"
    TRAINED = "trained"
    FILTERED = "filtered"
    DROPPED = "dropped"
    FAILED = "failed"

    @classmethod
    def _missing_(cls, value: object) -> State:
        raise StorageError(f"a group of the buffer is in the unknown state {value!r}: {DAMAGED}")


# The version from which on a run can be resumed, and how much was deleted. The table is newer than the format: a file
# without it is whole, and gets it when it is opened to write.
_PRUNED = """
CREATE TABLE IF NOT EXISTS pruned (
    run INTEGER PRIMARY KEY,
    before INTEGER NOT NULL,
    groups INTEGER NOT NULL,
    samples INTEGER NOT NULL
);
"""

# A resumed run is another incarnation of the same run. `round` counts the tasks of a slot from 0; the largest is the
# current one. `step` is the batch of a trained group, or the version at which a group failed or was filtered, and null
# in all other states. `incarnation` is the last that issued the group. `samples` reveals experiences lost to a damaged
# index.
# Blobs come last in the row of an ordinary table, so that readers of other columns never touch their pages; WITHOUT
# ROWID suits small rows only.
_TABLES = f"""
CREATE TABLE identity (id TEXT NOT NULL);
CREATE TABLE incarnations (
    number INTEGER PRIMARY KEY,
    run INTEGER NOT NULL,
    version INTEGER NOT NULL,
    started REAL NOT NULL
);
CREATE TABLE groups (
    run INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    round INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    task_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ({", ".join(repr(state.value) for state in State)})),
    explorer INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 1,
    incarnation INTEGER NOT NULL REFERENCES incarnations (number),
    oldest_version INTEGER,
    newest_version INTEGER,
    samples INTEGER,
    step INTEGER,
    error TEXT,
    PRIMARY KEY (run, batch, slot, round)
) WITHOUT ROWID;
CREATE INDEX groups_leased ON groups (run) WHERE state = 'leased';
CREATE INDEX groups_by_step ON groups (run, step) WHERE step IS NOT NULL;
CREATE TABLE experiences (
    run INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    round INTEGER NOT NULL,
    sample INTEGER NOT NULL,
    reward REAL NOT NULL,
    rewards TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    oldest_version INTEGER NOT NULL,
    newest_version INTEGER NOT NULL,
    finish_reason TEXT NOT NULL,
    generate_seconds REAL NOT NULL,
    reward_seconds REAL NOT NULL,
    metrics TEXT NOT NULL DEFAULT '{{}}',
    text TEXT NOT NULL,
    turns BLOB NOT NULL,
    PRIMARY KEY (run, batch, slot, round, sample)
);
{_PRUNED}
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT_VERSION};
"""


_UPDATE = f"""
BEGIN IMMEDIATE;
ALTER TABLE experiences ADD COLUMN metrics TEXT NOT NULL DEFAULT '{{}}';
PRAGMA user_version = {FORMAT_VERSION};
COMMIT;
"""


def check_format(connection: sqlite3.Connection, path: str | Path) -> bool:
    """True if the file holds a buffer, False if it is empty; ConfigurationError if it holds anything else."""
    application: int = connection.execute("PRAGMA application_id").fetchone()[0]
    version = _version(connection)
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        return False
    if application != APPLICATION_ID:
        raise ConfigurationError(
            f"buffer {str(path)!r} is a SQLite file of another program: set `buffer` to the path of a new file or of "
            "an earlier run's buffer"
        )
    if not OLDEST_VERSION <= version <= FORMAT_VERSION:
        raise ConfigurationError(
            f"buffer {str(path)!r} has format version {version}, this lightning_rft reads {OLDEST_VERSION} to "
            f"{FORMAT_VERSION}: set `buffer` to the path of a new file, or use the lightning_rft that wrote this one"
        )
    return True


def show_as_new(connection: sqlite3.Connection) -> None:
    """Has a reader, which must not change the file, see a file of an older format as one of today's."""
    if _version(connection) < FORMAT_VERSION:
        connection.execute("CREATE TEMP VIEW experiences AS SELECT *, '{}' AS metrics FROM main.experiences")


def prepare(connection: sqlite3.Connection, path: str | Path) -> None:
    """Sets up a connection to write, and creates the tables of a new file."""
    filled = check_format(connection, path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    # The log is merged into the file every 16 MB, as each merge waits for the disk twice.
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    if filled and _version(connection) < FORMAT_VERSION:
        connection.executescript(_UPDATE)
    if filled:
        connection.execute(_PRUNED)
    else:
        name = uuid.uuid4().hex
        connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} INSERT INTO identity VALUES ('{name}'); COMMIT;")


def _version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version
