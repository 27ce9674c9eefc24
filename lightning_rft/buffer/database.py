"""A buffer's file: opened once, held by one process, and changed in whole transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from lightning_rft.buffer.faults import opening_error, storage_errors
from lightning_rft.buffer.place import check_filesystem, lock
from lightning_rft.buffer.schema import prepare

__all__ = ["File"]


class File:
    """The SQLite file at a path, created with its folder if there is none.

    Args:
        path: Of the file, or ``":memory:"`` for one that dies with the process.

    Raises:
        ConfigurationError: Another run holds the file, it is no buffer or one of another format, it is on a network
            filesystem, or it cannot be opened at all.
        StorageError: The disk is full or broken, or the file is damaged. Every method raises it too.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with ExitStack() as resources:
            if str(path) != ":memory:":
                check_filesystem(Path(path))
                lock(Path(path), resources)
            try:
                # Autocommit: transactions begin and end where this file says so, not where sqlite3 guesses.
                self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                resources.callback(self._close)
                prepare(self.connection, path)
                self.id: str = self.connection.execute("SELECT id FROM identity").fetchone()[0]
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                raise opening_error(path, error) from error
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Closes the file and lets other runs open it. Closing twice is harmless."""
        self._resources.close()

    def _close(self) -> None:
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[Self]:
        """All that is executed inside happens whole, or, if anything raises, not at all; inside another, with that."""
        inside = self.connection.in_transaction
        if inside:
            yield self
            return
        with storage_errors(self.path):
            try:
                # Within the try: where Ctrl+C is noticed as this returns, all that follows would join a transaction
                # that nobody commits.
                self.connection.execute("BEGIN IMMEDIATE")
                yield self
                self.connection.execute("COMMIT")
            except BaseException:
                # SQLite itself rolls back on some errors (a full disk); asking again would hide the real one.
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """One statement of a transaction."""
        return self.connection.execute(statement, values)

    def insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Whole rows, one or more, of a transaction."""
        self.connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    def ask(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        """All answers to a question, outside of a transaction."""
        with storage_errors(self.path):
            return self.connection.execute(question, values).fetchall()
