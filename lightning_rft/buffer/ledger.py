"""The ledger of a buffer: every group from issue to training, in one SQLite file.

Any SQLite reader can query it while the run goes on::

    sqlite3 buffer.sqlite "SELECT state, count(*) FROM groups GROUP BY state"

or :func:`~lightning_rft.buffer.reader.read_buffer` reads all of it. The file is in write-ahead mode with
``synchronous=NORMAL``: a change that returned survives the death of the process, while a power cut may cost the last
moments, but never the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from lightning_rft.buffer.codec import COLUMNS, to_group, to_row
from lightning_rft.buffer.database import File
from lightning_rft.buffer.resume import ENDED, ROUND, Round, apply, current, settle, unsettled
from lightning_rft.buffer.schema import State
from lightning_rft.errors import ScheduleError
from lightning_rft.experience import Group, GroupKey, Progress

__all__ = ["Ledger", "State"]


class Ledger:
    """Every group of the runs in a file, and their experiences. Made by :meth:`open`.

    A file holds runs, and a run has incarnations: it begins with one, and each time that it is resumed it gets another.
    All methods act on the run that was begun or resumed last.

    Each method is one transaction: it happens whole or, if it raises, not at all. Threads may share a ledger if the
    caller lets in one at a time; a second process cannot open the file to write. Every method raises
    :class:`~lightning_rft.errors.StorageError` if the disk fails, and :class:`~lightning_rft.errors.ScheduleError` if a
    group is in a state that its change does not start from.

    Groups live in the file only: what is packed once is cheap to read back, and a long exploration would fill the
    memory.

    Example:
        >>> with Ledger.open(":memory:") as ledger:
        ...     ledger.begin()
        ...     ledger.issue(GroupKey(batch=0, slot=0), task_id="7", epoch=0, explorer=0)
        ...     ledger.counts()[State.ISSUED]
        1
        1
    """

    def __init__(self, file: File) -> None:
        self._file = file
        latest = file.ask("SELECT run, number FROM incarnations ORDER BY number DESC LIMIT 1")
        self._run, self._incarnation = latest[0] if latest else (0, 0)

    @classmethod
    def open(cls, path: str | Path) -> Ledger:
        """Opens or creates a file (``":memory:"`` for none) and holds it; ConfigurationError if it cannot be used."""
        file = File(path)
        try:
            return cls(file)
        except BaseException:
            file.close()
            raise

    @property
    def id(self) -> str:
        """The file's own random name, by which a checkpoint knows it again wherever it lies."""
        return self._file.id

    def close(self) -> None:
        """Closes the file and lets other runs open it. Closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Runs

    def begin(self, version: int = 0) -> int:
        """Begins a run whose policy starts with this version; returns the number of its incarnation, from 1."""
        with self._file.transaction() as file:
            run = file.execute("SELECT coalesce(max(run), 0) + 1 FROM incarnations").fetchone()[0]
            number = self._incarnate(run, version)
        self._run, self._incarnation = run, number
        return number

    def resume(
        self,
        incarnation: int,
        progress: Progress,
        *,
        oldest: int,
        expected: Callable[[GroupKey], tuple[str, int] | None],
    ) -> tuple[int, dict[GroupKey, int]] | None:
        """Goes on with the run of an incarnation from a checkpoint.

        Groups that are part of the checkpoint's weights are trained. Of the others, those whose stored experience can
        still be used are ready, and the rest dropped, to be issued again. Tasks that failed or were filtered after the
        checkpoint have not.

        Args:
            incarnation: The one that wrote the checkpoint.
            progress: What the checkpoint's weights were trained with.
            oldest: The oldest version that a token may have. None may be newer than the checkpoint's.
            expected: The task id and epoch that the run will now explore under a key, None if none is known; what is
                stored for another task is not used. It must not call the ledger.

        Returns:
            The number of the new incarnation, and the oldest version of every group that is ready. None, and nothing is
            changed, if the file has another history than the checkpoint: it knows no such incarnation, or that one or
            what followed it went on from elsewhere.
        """
        version = progress.version
        with self._file.transaction() as file:
            row = file.execute("SELECT run, version FROM incarnations WHERE number = ?", incarnation).fetchone()
            if row is None or row[1] > version:
                return None
            run: int = row[0]
            # One that later went on from before the checkpoint has lived another life since.
            later = "SELECT count(*) FROM incarnations WHERE run = ? AND number > ? AND version < ?"
            if file.execute(later, run, incarnation, version).fetchone()[0]:
                return None
            changes = list(settle(unsettled(file, run, progress), incarnation, progress, oldest, expected))
            for change in changes:
                apply(file, run, change)
            number = self._incarnate(run, version)
        self._run, self._incarnation = run, number
        return number, {c.key: c.oldest_version for c in changes if c.oldest_version is not None}

    # Groups

    @contextmanager
    def together(self) -> Iterator[None]:
        """All changes inside happen, or, if anything raises or the process dies, none of them."""
        with self._file.transaction():
            yield

    def issue(self, key: GroupKey, task_id: str, epoch: int, explorer: int) -> None:
        """Notes that an explorer was given a group: a new one or one that is issued, dropped, filtered or failed.

        A further issue of what is issued or dropped counts as one more attempt and forgets what the one before left
        behind. After a filtered or failed task another one begins the next round of the slot.
        """
        if not self._run:
            raise ScheduleError(f"group {tuple(key)} cannot be issued: call begin or resume first")
        with self._file.transaction() as file:
            current = self._current(key)
            if current is None or (current.state in ENDED and current.task != (task_id, epoch)):
                round = 0 if current is None else current.round + 1
                file.execute(
                    "INSERT INTO groups (run, batch, slot, round, epoch, task_id, state, explorer, incarnation)"
                    " VALUES (?, ?, ?, ?, ?, ?, 'issued', ?, ?)",
                    *(self._run, *key, round, epoch, task_id, explorer, self._incarnation),
                )
                return
            self._check(key, current, State.ISSUED, State.ISSUED, State.DROPPED)
            at = (self._run, *key, current.round)
            file.execute(
                "UPDATE groups SET state = 'issued', epoch = ?, task_id = ?, explorer = ?, attempts = attempts + 1,"
                f" incarnation = ?, oldest_version = NULL, newest_version = NULL, samples = NULL WHERE {ROUND}",
                *(epoch, task_id, explorer, self._incarnation, *at),
            )
            file.execute(f"DELETE FROM experiences WHERE {ROUND}", *at)

    def ready(self, group: Group) -> None:
        """Stores an issued group that an explorer finished: experiences of its task, at least one, with tokens."""
        key, task_id = group.key, group.task_id
        if not group.experiences:
            raise ScheduleError(f"group {tuple(key)} cannot be ready: it has no experiences")
        for experience in group.experiences:
            if experience.task_id != task_id or not experience.num_tokens:
                raise ScheduleError(
                    f"group {tuple(key)} of task {task_id!r} cannot be ready: its sample {experience.sample} has "
                    f"{experience.num_tokens} tokens for task {experience.task_id!r}"
                )
        rows = [to_row(experience) for experience in group.experiences]
        with self._file.transaction() as file:
            current = self._check(key, self._current(key), State.READY, State.ISSUED)
            # A late answer to the task that this group had before it was issued again must not pass as the new one's.
            if current.task[0] != task_id:
                raise ScheduleError(f"group {tuple(key)} cannot be ready: issued for another task than {task_id!r}")
            at = (self._run, *key, current.round)
            file.insert("experiences", [at + row for row in rows])
            file.execute(
                f"UPDATE groups SET state = 'ready', oldest_version = ?, newest_version = ?, samples = ? WHERE {ROUND}",
                *(group.oldest_version, group.newest_version, len(rows), *at),
            )

    def lease(self, keys: Sequence[GroupKey]) -> list[Group]:
        """Takes ready groups, in the order of ``keys``, experiences in the order in which they were stored."""
        with self._file.transaction():
            return [self._stored(key, self._change(key, State.LEASED, State.READY)) for key in keys]

    def read(self, keys: Iterable[GroupKey]) -> list[Group]:
        """The ready groups of these keys, without taking them."""
        with self._file.transaction():
            return [self._stored(key, self._check(key, self._current(key), State.READY, State.READY)) for key in keys]

    def release(self) -> None:
        """Gives back what is leased: it is ready again. Nothing leased is fine."""
        with self._file.transaction() as file:
            file.execute("UPDATE groups SET state = 'ready' WHERE run = ? AND state = 'leased'", self._run)

    def trained(self, step: int) -> None:
        """Notes that what is leased, at least one group, was trained as batch ``step``. Its experiences stay."""
        change = "UPDATE groups SET state = 'trained', step = ? WHERE run = ? AND state = 'leased'"
        with self._file.transaction() as file:
            if not file.execute(change, step, self._run).rowcount:
                raise ScheduleError(f"batch {step} cannot go to trained: no group is leased")

    def failed(self, key: GroupKey, error: str, step: int) -> None:
        """Notes that the task of an issued group ended in an error, for good, at version ``step``."""
        with self._file.transaction():
            self._change(key, State.FAILED, State.ISSUED, step=step, error=error)

    def filtered(self, key: GroupKey, step: int) -> None:
        """Notes that an issued, ready or leased group was judged not worth training, at version ``step``.

        That ends its task. What was not stored yet is not stored.
        """
        with self._file.transaction():
            self._change(key, State.FILTERED, State.ISSUED, State.READY, State.LEASED, step=step)

    def dropped(self, key: GroupKey) -> None:
        """Notes that an issued, ready or leased group will not be trained as it is; it may be issued again."""
        with self._file.transaction():
            self._change(key, State.DROPPED, State.ISSUED, State.READY, State.LEASED)

    # Questions

    def counts(self) -> dict[State, int]:
        """How many groups of the run are in each state, zeros included; each task that a slot had counts as one."""
        found = dict(self._file.ask("SELECT state, count(*) FROM groups WHERE run = ? GROUP BY state", self._run))
        return {state: found.get(state.value, 0) for state in State}

    def trained_tasks(self, epoch: int | None = None) -> list[str]:
        """Ids of the tasks that the run trained, in training order; of one epoch if given."""
        return [task_id for task_id, state in self.ended(epoch) if state is State.TRAINED]

    def ended(self, epoch: int | None = None) -> list[tuple[str, State]]:
        """Ids of the tasks that the run trained, filtered or failed, by step; of one epoch if given."""
        rows = self._file.ask(
            "SELECT task_id, state FROM groups WHERE run = ? AND step IS NOT NULL AND epoch = coalesce(?, epoch)"
            " ORDER BY step, batch, slot, round",
            *(self._run, epoch),
        )
        return [(task_id, State(state)) for task_id, state in rows]

    # Parts of transactions

    def _current(self, key: GroupKey) -> Round | None:
        return current(self._file, self._run, key)

    def _check(self, key: GroupKey, current: Round | None, new: State, *legal: State) -> Round:
        if current is None or current.state not in legal:
            name = current.state.value if current else "never issued"
            raise ScheduleError(f"group {tuple(key)} of run {self._run} is {name}: not to {new.value}")
        return current

    def _change(
        self, key: GroupKey, new: State, *legal: State, step: int | None = None, error: str | None = None
    ) -> Round:
        current = self._check(key, self._current(key), new, *legal)
        self._file.execute(
            f"UPDATE groups SET state = ?, step = ?, error = ? WHERE {ROUND}",
            *(new.value, step, error, self._run, *key, current.round),
        )
        return current

    def _stored(self, key: GroupKey, current: Round) -> Group:
        rows = self._file.execute(
            f"SELECT {COLUMNS} FROM experiences WHERE {ROUND} ORDER BY rowid", self._run, *key, current.round
        )
        return to_group(key, current.task[0], rows, current.samples)

    def _incarnate(self, run: int, version: int) -> int:
        self._file.insert("incarnations", [(None, run, version, time.time())])
        number: int = self._file.execute("SELECT max(number) FROM incarnations").fetchone()[0]
        return number
