"""The ledger of a buffer: every group from issue to training, in one SQLite file.

Any SQLite reader can query it during the run::

    sqlite3 buffer.sqlite "SELECT state, count(*) FROM groups GROUP BY state"

The file is in write-ahead mode with ``synchronous=NORMAL``: a change that returned survives the death of the process,
while a power cut may cost the last moments, but never the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from lightning_rft.buffer.codec import COLUMNS, to_group, to_row
from lightning_rft.buffer.database import File
from lightning_rft.buffer.pruning import prune, pruned_before
from lightning_rft.buffer.resume import ENDED, ROUND, Round, apply, current, settle, unsettled
from lightning_rft.buffer.schema import State
from lightning_rft.errors import ScheduleError
from lightning_rft.experience import Group, GroupKey, Progress

__all__ = ["Ledger", "State"]

_LEASED = "groups INDEXED BY groups_leased"  # left to itself, SQLite looks at every group of the run


class Ledger:
    """Every group of the runs in a file, and their experiences.

    A run has one incarnation when it begins and one more each time it is resumed; all methods act on the run that was
    begun or resumed last. Each method is one transaction. It raises StorageError if the disk fails, and ScheduleError
    if a group is in the wrong state for the change. Threads must take turns.

    Groups live in the file only: they are cheap to read back, and a long exploration would fill the memory.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        latest = file.ask("SELECT run, number FROM incarnations ORDER BY number DESC LIMIT 1")
        self._run, self._incarnation = latest[0] if latest else (0, 0)

    @classmethod
    def open(cls, path: str | Path) -> Ledger:
        """Opens or creates a file (``":memory:"`` for none) and locks it; ConfigurationError if it cannot be used."""
        file = File(path)
        try:
            return cls(file)
        except BaseException:
            file.close()
            raise

    @property
    def id(self) -> str:
        """The file's own random name, by which a checkpoint recognises it after a move."""
        return self._file.id

    def close(self) -> None:
        """Closes the file and lets other runs open it; safe to call twice."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
        """Resumes the run from a checkpoint that an incarnation wrote.

        Returns the number of the new incarnation, and the oldest version of every ready group; or None, with nothing
        changed, if the file has another history than the checkpoint, or is pruned beyond it. For ``oldest`` and
        ``expected`` see :func:`~lightning_rft.buffer.resume.settle`; the latter must not call the ledger.
        """
        version = progress.version
        with self._file.transaction() as file:
            row = file.execute("SELECT run, version FROM incarnations WHERE number = ?", incarnation).fetchone()
            if row is None or row[1] > version:
                return None
            run: int = row[0]
            if pruned_before(file, run) > version:
                return None
            # If a later incarnation resumed from before the checkpoint, the file's history has left the checkpoint's.
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
        """Makes one transaction of all changes inside."""
        with self._file.transaction():
            yield

    def issue(self, key: GroupKey, task_id: str, epoch: int, explorer: int) -> None:
        """Records that an explorer was given a group.

        Of an issued or dropped group it is one more attempt, which deletes what the last one stored. After a filtered
        or failed task it begins the next round of the slot.
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
        """Stores an issued group that an explorer finished."""
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
            file.insert(f"experiences (run, batch, slot, round, {COLUMNS})", [at + row for row in rows])
            file.execute(
                f"UPDATE groups SET state = 'ready', oldest_version = ?, newest_version = ?, samples = ? WHERE {ROUND}",
                *(group.oldest_version, group.newest_version, len(rows), *at),
            )

    def lease(self, keys: Sequence[GroupKey]) -> list[Group]:
        """Takes ready groups for the trainer."""
        with self._file.transaction():
            return [self._stored(key, self._change(key, State.LEASED, State.READY)) for key in keys]

    def read(self, keys: Iterable[GroupKey]) -> list[Group]:
        """Reads ready groups without taking them."""
        with self._file.transaction():
            return [self._stored(key, self._check(key, self._current(key), State.READY, State.READY)) for key in keys]

    def release(self) -> None:
        """Makes what is leased ready again."""
        with self._file.transaction() as file:
            file.execute(f"UPDATE {_LEASED} SET state = 'ready' WHERE run = ? AND state = 'leased'", self._run)

    def trained(self, step: int) -> None:
        """Records that what is leased was trained as batch ``step``."""
        change = f"UPDATE {_LEASED} SET state = 'trained', step = ? WHERE run = ? AND state = 'leased'"
        with self._file.transaction() as file:
            if not file.execute(change, step, self._run).rowcount:
                raise ScheduleError(f"batch {step} cannot go to trained: no group is leased")

    def prune(self, before: int) -> None:
        """Deletes the groups of batches before ``before`` that were trained in steps before it.

        The run can be resumed from version ``before`` or a later one as if nothing had been deleted.
        """
        with self._file.transaction() as file:
            prune(file, self._run, before)

    def failed(self, key: GroupKey, error: str, step: int) -> None:
        """Records that the task of an issued group ended in an error at version ``step``."""
        with self._file.transaction():
            self._change(key, State.FAILED, State.ISSUED, step=step, error=error)

    def filtered(self, key: GroupKey, step: int) -> None:
        """Records that a group was judged not worth training at version ``step``, which ends its task."""
        with self._file.transaction():
            self._change(key, State.FILTERED, State.ISSUED, State.READY, State.LEASED, step=step)

    def dropped(self, key: GroupKey) -> None:
        """Records that a group is given up; it may be issued again."""
        with self._file.transaction():
            self._change(key, State.DROPPED, State.ISSUED, State.READY, State.LEASED)

    # Questions

    def counts(self) -> dict[State, int]:
        """The number of groups in each state, zeros included; every round of a slot counts."""
        found = dict(self._file.ask("SELECT state, count(*) FROM groups WHERE run = ? GROUP BY state", self._run))
        return {state: found.get(state.value, 0) for state in State}

    def trained_tasks(self, epoch: int | None = None) -> list[str]:
        """Ids of the trained tasks in training order, of one epoch if given."""
        return [task_id for task_id, state in self.ended(epoch) if state is State.TRAINED]

    def ended(self, epoch: int | None = None) -> list[tuple[str, State]]:
        """Ids and ends of the tasks that were trained, filtered or failed, by step; of one epoch if given."""
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
