"""Full disks, damaged files and power cuts, for real: what is left is whole, and the error says what to do."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.buffer.reader import read_buffer
from lightning_rft.errors import ConfigurationError, RFTError, StorageError
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from tests.buffer.groups import bring, dump, make_group, query


def long_group(batch: int) -> Group:
    turn = Turn(tuple(range(500)), tuple(range(500)), (-0.1,) * 500, (batch,) * 500, "stop")
    return Group(GroupKey(batch, 0), str(batch), tuple(Experience(str(batch), i, (turn,), 1.0) for i in range(4)))


def fill(path: Path, batches: int) -> None:
    with Ledger.open(path) as ledger:
        ledger.begin()
        for batch in range(batches):
            ledger.issue(GroupKey(batch, 0), str(batch), 0, 0)
            ledger.ready(long_group(batch))


def test_a_full_disk_loses_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        for batch in range(20):
            ledger.issue(GroupKey(batch, 0), str(batch), 0, 0)
        (pages,) = query(ledger, "PRAGMA page_count")[0]
        query(ledger, f"PRAGMA max_page_count = {pages + 20}")
        stored = 0

        def store() -> None:
            nonlocal stored
            for batch in range(20):
                ledger.ready(long_group(batch))
                stored += 1

        with pytest.raises(StorageError, match=r"buffer .*buffer.sqlite.* full.* free space .*`ckpt_path`") as error:
            store()
        assert isinstance(error.value.__cause__, sqlite3.OperationalError)
        assert 0 < stored < 20
        assert ledger.counts()[State.READY] == stored and ledger.counts()[State.ISSUED] == 20 - stored
        query(ledger, "PRAGMA max_page_count = 100000")  # somebody makes room
        ledger.ready(long_group(stored))
        keys = [GroupKey(batch, 0) for batch in range(stored + 1)]
        assert ledger.lease(keys) == [long_group(batch) for batch in range(stored + 1)]
    with Ledger.open(path) as ledger:
        ledger.release()
        assert ledger.lease(keys) == [long_group(batch) for batch in range(stored + 1)]


def test_a_disk_that_fails_while_a_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_rft.buffer.schema._TABLES", "PRAGMA max_page_count = 3; CREATE TABLE a (b);" * 9)
    path = tmp_path / "buffer.sqlite"
    with pytest.raises((StorageError, ConfigurationError), match="buffer"):
        Ledger.open(path)
    monkeypatch.undo()
    Ledger.open(path).close()


def test_a_file_that_cannot_be_written_any_more(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "buffer.sqlite") as ledger:
        ledger.begin()
        query(ledger, "PRAGMA query_only = ON")
        with pytest.raises(StorageError, match="see that its disk works"):
            bring(ledger, GroupKey(0, 0), State.READY)


def test_mistakes_in_the_use_are_no_faults_of_the_disk(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "buffer.sqlite")
    ledger.close()
    with pytest.raises(sqlite3.ProgrammingError):
        ledger.counts()


@pytest.mark.parametrize("statement", ["BEGIN", "UPDATE", "COMMIT"])
def test_what_follows_an_interrupt_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str) -> None:
    """Ctrl+C is noticed as a statement returns: whichever it is, no transaction may stay open for later changes."""
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        bring(ledger, GroupKey(0, 0), State.READY)
        with monkeypatch.context() as patch:
            patch.setattr(ledger._file, "connection", Interrupted(ledger._file.connection, statement))
            with pytest.raises(KeyboardInterrupt):
                ledger.lease([GroupKey(0, 0)])
        bring(ledger, GroupKey(0, 1), State.READY)
    states = {row["slot"]: row["state"] for row in read_buffer(path)}
    assert states == {0: "leased" if statement == "COMMIT" else "ready", 1: "ready"}


class Interrupted:
    """A connection that is interrupted once a statement of this kind was executed."""

    def __init__(self, connection: sqlite3.Connection, statement: str) -> None:
        self._connection = connection
        self._statement = statement

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        cursor = self._connection.execute(statement, *values)
        if statement.startswith(self._statement):
            raise KeyboardInterrupt
        return cursor


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.95])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    path = tmp_path / "buffer.sqlite"
    fill(path, 20)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    if not share:  # as a new file
        with Ledger.open(path) as ledger:
            assert ledger.begin() == 1
        return
    with pytest.raises((StorageError, ConfigurationError), match=r"buffer\.sqlite.*set|to a new path"):
        list(read_buffer(path))
    with pytest.raises((StorageError, ConfigurationError)), Ledger.open(path) as ledger:
        ledger.lease([GroupKey(batch, 0) for batch in range(20)])


def test_flipped_bits_never_reach_a_gradient(tmp_path: Path) -> None:
    """Tokens and rewards of a group are those that were stored, or it cannot be had; all errors are typed."""
    path = tmp_path / "buffer.sqlite"
    fill(path, 6)
    data = path.read_bytes()
    rng = random.Random(0)
    noticed = 0
    for _ in range(200):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            with Ledger.open(path) as ledger:
                for batch in range(6):
                    (group,) = ledger.lease([GroupKey(batch, 0)])
                    for ours, stored in zip(group.experiences, long_group(batch).experiences, strict=True):
                        assert (ours.turns, ours.reward) == (stored.turns, stored.reward)
        except RFTError:
            noticed += 1
    assert noticed > 140  # most of the file is tokens


def test_a_damaged_sample_is_named_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    fill(path, 1)
    data = path.read_bytes()
    spot = data.index(b"".join(number.to_bytes(4, "little") for number in range(100, 140)))
    path.write_bytes(data[:spot] + b"\xff" + data[spot + 1 :])
    with Ledger.open(path) as ledger:
        before = dump(ledger)
        with pytest.raises(StorageError, match=r"buffer\.sqlite.*malformed.*`ckpt_path` and `buffer` set to a new"):
            ledger.lease([GroupKey(0, 0)])
        assert dump(ledger) == before
    with pytest.raises(StorageError, match="malformed"):
        list(read_buffer(path))
    assert len(list(read_buffer(path, tokens=False))) == 4


def test_a_power_cut_leaves_an_earlier_moment(tmp_path: Path) -> None:
    """Whatever part of the log got to the disk, the file is as after one of the changes."""
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        moments = [dump(ledger)]
        ledger.begin()
        moments.append(dump(ledger))
        for batch in range(6):
            key = GroupKey(batch, 0)
            for change in (
                lambda key=key: ledger.issue(key, "t", 0, 0),
                lambda key=key: ledger.ready(make_group(key, "t")),
                lambda key=key: ledger.lease([key]),
                lambda batch=batch: ledger.trained(batch),
            ):
                change()
                moments.append(dump(ledger))
        log = Path(f"{path}-wal").read_bytes()
        shutil.copy(path, tmp_path / "main")
    seen = set()
    rng = random.Random(0)
    for cut in range(40):
        copy = tmp_path / f"{cut}.sqlite"
        shutil.copy(tmp_path / "main", copy)
        Path(f"{copy}-wal").write_bytes(log[: rng.randrange(len(log) + 1)])
        with Ledger.open(copy) as ledger:
            now = [line for line in dump(ledger) if "identity" not in line]
            seen.add(next(i for i, then in enumerate(moments) if now == [x for x in then if "identity" not in x]))
    assert len(seen) > 10
