"""Reading a buffer beside the run that writes it, and after."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.buffer.reader import StoredExperience, read_buffer
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import GroupKey
from tests.buffer.groups import as_format_3, bring, make_group

GROUP = {"run": 1, "incarnation": 1, "slot": 0, "round": 0, "epoch": 0, "attempts": 1, "error": None}


def test_one_row_per_sample(tmp_path: Path) -> None:
    path = tmp_path / "of a run?.sqlite"  # needs quoting in a URI
    with Ledger.open(path) as ledger:
        ledger.begin()
        bring(ledger, GroupKey(0, 0), State.TRAINED, "a", version=3, step=4)
        bring(ledger, GroupKey(1, 0), State.FAILED, "b", step=5)
        ledger.issue(GroupKey(1, 0), "c", 1, 0)
        beside = list(read_buffer(path))
        lean = list(read_buffer(str(path), tokens=False))
    assert list(read_buffer(path)) == beside
    assert [(row["batch"], row["round"], row["sample"], row["state"], row["step"]) for row in lean] == [
        (0, 0, 0, "trained", 4),
        (0, 0, 1, "trained", 4),
        (1, 0, None, "failed", 5),
        (1, 1, None, "issued", None),
    ]
    sample = {"sample": 1, "reward": 1 / 3, "num_tokens": 3, "finish_reason": "length", "text": "text é"}
    versions = {"rewards": '{"format": 0.5}', "metrics": '{"calls": 1.0}', "oldest_version": 3, "newest_version": 4}
    assert lean[1] == GROUP | {"batch": 0, "task_id": "a", "state": "trained", "step": 4} | sample | versions
    tokens = {
        "prompt_ids": [[1, 2], [1, 2, 3]],
        "token_ids": [[3], [4, 5]],
        "logprobs": [[-0.5], [-0.125, float("-inf")]],
        "versions": [[4], [3, 4]],
        "temperature": [1.0, 0.5],
    }
    assert beside[1] == lean[1] | tokens
    assert beside[2] == lean[2] | dict.fromkeys(tokens)
    assert lean[2]["error"] == "boom" and lean[2]["text"] is None and lean[2]["oldest_version"] is None
    assert {tuple(row) for row in beside} == {tuple(beside[0])}  # every row has the same columns


def test_a_reader_sees_one_moment_and_holds_up_nobody(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        for batch in range(3):
            bring(ledger, GroupKey(batch, 0), State.READY)
        before = path.read_bytes()
        rows = read_buffer(path)
        first = next(rows)
        ledger.dropped(GroupKey(2, 0))
        bring(ledger, GroupKey(3, 0), State.READY)
        seen = [first, *rows]
        assert len(seen) == 6 and {row["state"] for row in seen} == {"ready"}
        assert path.read_bytes() == before
        assert len(list(read_buffer(path))) == 8
        assert ledger.lease([GroupKey(3, 0)]) == [make_group(GroupKey(3, 0), "task")]


def test_a_reader_takes_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        bring(ledger, GroupKey(0, 0), State.READY)
    rows = read_buffer(path)
    next(rows)
    with Ledger.open(path) as ledger:
        ledger.begin()
    assert len(list(rows)) == 1


def test_what_is_no_buffer_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not a database, and long enough to have a header of its own" * 50)
    (tmp_path / "empty").touch()
    with closing(sqlite3.connect(tmp_path / "foreign")) as connection:
        connection.execute("CREATE TABLE t (x)")
    Ledger.open(tmp_path / "future").close()
    with closing(sqlite3.connect(tmp_path / "future")) as connection:
        connection.execute("PRAGMA user_version = 99")
    for name, words in (
        ("none", "no buffer"),
        ("", "no buffer"),
        ("text", "SQLite"),
        ("empty", "empty"),
        ("foreign", "another program"),
        ("future", "format version 99"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            next(read_buffer(tmp_path / name))
    assert not (tmp_path / "none").exists() and not (tmp_path / "empty").read_bytes()


@pytest.mark.parametrize("writable", [True, False])
def test_a_file_from_before_metrics_is_read_as_it_is(tmp_path: Path, writable: bool) -> None:
    path = tmp_path / "buffer.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        bring(ledger, GroupKey(0, 0), State.READY)
    expected = list(read_buffer(path))
    as_format_3(path)
    before = path.read_bytes()
    if not writable:
        path.chmod(0o400)
    assert list(read_buffer(path)) == [row | {"metrics": "{}"} for row in expected]
    stored = StoredExperience(path, tasks_per_step=1, shuffle=False, seed=0, version=lambda: 0)
    (group,) = stored.wanted(0)
    assert [one.metrics for one in group.experiences] == [{}, {}]
    assert path.read_bytes() == before
