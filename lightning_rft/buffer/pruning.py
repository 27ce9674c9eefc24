"""Deletion of groups that were trained long ago, so that a buffer's file stops growing.

Pages that become free are used again: the file stays as large as it was at its largest, and none is read or moved to
make it smaller.

A resume from version *v* asks about groups of batch *v* and later, groups that ended at step *v* or later, groups that
have not ended, and groups of earlier batches that the checkpoint says are not trained. A group that was trained in a
step before *v* and is of a batch before *v* is none of these, so pruning before *v* changes nothing for it. A resume
from an earlier version would find a gap, and is told that the file has another history.
"""

from __future__ import annotations

from lightning_rft.buffer.database import File

__all__ = ["prune", "pruned_before"]


def prune(file: File, run: int, before: int) -> None:
    """Deletes the groups of batches before ``before`` that were trained in steps before it, inside a transaction."""
    slots = file.execute(
        "SELECT run, batch, slot FROM groups WHERE run = ? AND batch < ? AND step < ? AND state = 'trained'",
        *(run, before, before),
    ).fetchall()

    def delete(table: str) -> int:
        statement = f"DELETE FROM {table} WHERE run = ? AND batch = ? AND slot = ?"
        return sum(file.execute(statement, *slot).rowcount for slot in slots)

    if slots:
        file.execute(
            "INSERT INTO pruned VALUES (?, ?, ?, ?) ON CONFLICT (run) DO UPDATE SET"
            " before = max(before, excluded.before), groups = groups + excluded.groups,"
            " samples = samples + excluded.samples",
            *(run, before, delete("groups"), delete("experiences")),
        )


def pruned_before(file: File, run: int) -> int:
    """The version from which on a run can be resumed."""
    found = file.execute("SELECT before FROM pruned WHERE run = ?", run).fetchone()
    return 0 if found is None else int(found[0])
