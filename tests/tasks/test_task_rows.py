"""Where tasks may come from: lists, tables, files and folders, whatever their columns are called."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import lightning_rft as rft
from lightning_rft.experience import GroupKey, Task
from lightning_rft.rewards import check_answers, exact_match
from lightning_rft.tasks.plan import TaskCursor, TaskPlan
from lightning_rft.tasks.source import known
from lightning_rft.tasks.sources import Tasks, as_tasks
from lightning_rft.tasks.task_set import read_tasks

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")

ROWS: list[dict[str, Any]] = [
    {"question": "1 + 1 =", "answer": "2", "level": 1},
    {"question": "2 + 2 =", "answer": "4", "level": 3},
    {"question": "3 + 3 =", "answer": "6", "level": 2},
]
EXPECTED = as_tasks(ROWS)
VERL = [
    {
        "data_source": "school",
        "prompt": [{"role": "user", "content": f"{i} + 1 ="}],
        "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        "extra_info": {"index": i} | ({"hint": "count"} if i else {}),
    }
    for i in range(3)
]


def saved(kind: str, folder: Path) -> Path:
    """The rows, as they are found on a disk."""
    data = datasets.Dataset.from_list(ROWS)
    path = folder / f"tasks.{kind}"
    if kind == "parquet":
        data.to_parquet(path)
    elif kind == "csv":
        data.to_csv(path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "folder":
        path.mkdir()
        data.to_json(path / "train.jsonl")
    elif kind == "dataset":
        data.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def plain(tasks: Any) -> list[tuple[Any, str, str, Any]]:
    """What all forms have in common: CSV has no strings that look like numbers."""
    return [(task.prompt, str(task.answer), task.id, task.metadata) for task in tasks]


@pytest.mark.parametrize(
    "table",
    [
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).with_format("numpy"),
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
        pandas.DataFrame(ROWS),
        pyarrow.Table.from_pylist(ROWS),
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
        dict(enumerate(ROWS)).values(),
    ],
    ids=["datasets", "numpy", "splits", "pandas", "arrow", "columns", "no sequence"],
)
def test_tables(table: Any) -> None:
    tasks = rft.TaskSet(table).read()
    assert list(tasks) == EXPECTED == read_tasks(table, "val_tasks")
    assert [tasks[1], tasks[-1], *tasks[:2]] == [EXPECTED[1], EXPECTED[2], *EXPECTED[:2]]  # type: ignore[index]
    assert list(pickle.loads(pickle.dumps(tasks))) == EXPECTED  # as ddp_spawn sends them


def test_a_table_of_polars() -> None:
    class Frame(list[Any]):  # as much of one as is asked for
        def __getitem__(self, rows: Any) -> Any:
            return Frame(list(self)[rows])

        def to_dicts(self) -> list[Any]:
            return list(self)

    assert list(rft.TaskSet(Frame(ROWS)).read()) == EXPECTED


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "folder", "dataset", "splits"])
def test_files_and_folders(kind: str, tmp_path: Path) -> None:
    path = saved(kind, tmp_path)
    tasks = rft.TaskSet(str(path)).read()
    assert plain(tasks) == plain(pickle.loads(pickle.dumps(tasks))) == plain(EXPECTED)
    assert plain(read_tasks(path, "val_tasks")) == plain(EXPECTED)
    if kind == "splits":
        assert [task.prompt for task in rft.TaskSet(path, split="test").read()] == ["2 + 2 ="]
        with pytest.raises(rft.ConfigurationError, match=r"no split 'dev': set TaskSet\(split=...\) to train, test"):
            rft.TaskSet(path, split="dev").read()
    if kind in ("parquet", "folder"):
        assert len(rft.TaskSet(path, split="train[:2]").read()) == 2  # type: ignore[arg-type]
        stream = rft.TaskSet(path, streaming=True, steps_per_epoch=1).read()
        assert [stream.at(position).prompt for position in range(4)] == [  # type: ignore[union-attr]
            *("1 + 1 =", "2 + 2 =", "3 + 3 =", "1 + 1 =")
        ]


def test_what_datasets_cannot_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"tasks='nobody/nothing', split='train': datasets cannot load it"):
        rft.TaskSet("nobody/nothing").read()
    with pytest.raises(rft.ConfigurationError, match=r"tasks cannot be read from .*no\.parquet"):
        rft.TaskSet(str(tmp_path / "no.parquet")).read()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(rft.ConfigurationError, match=r"datasets, which is not installed: pip install .*\[data\]"):
        rft.TaskSet("openai/gsm8k", name="main").read()


# Columns


@pytest.mark.parametrize("prompt", ["prompt", "messages", "question", "problem"])
@pytest.mark.parametrize("answer", ["answer", "solution", "ground_truth"])
def test_the_usual_names_are_found(prompt: str, answer: str) -> None:
    (task,) = as_tasks([{prompt: "p", answer: "a", "more": 1}])
    assert task == Task("p", answer="a", id="0", metadata={"more": 1})


def test_the_first_name_that_has_a_value_wins() -> None:
    (task,) = as_tasks([{"problem": "c", "question": "b", "prompt": None, "answer": None, "solution": "s", "id": 3}])
    assert task == Task("b", answer="s", id="3", metadata={"problem": "c"})


@pytest.mark.parametrize("form", ["parquet", "pandas", "list"])
def test_files_of_verl(form: str, tmp_path: Path) -> None:
    if form == "list":
        source: Any = VERL
    else:
        source = tmp_path / "tasks.parquet"
        datasets.Dataset.from_list(VERL).to_parquet(source)
        source = pandas.read_parquet(source) if form == "pandas" else source  # which has arrays of messages
    tasks = list(rft.TaskSet(source).read())
    assert [task.prompt for task in tasks] == [row["prompt"] for row in VERL]
    assert [task.answer for task in tasks] == ["1", "2", "3"]
    # the index that has no hint got none from Arrow
    assert [task.metadata["extra_info"] for task in tasks] == [row["extra_info"] for row in VERL]
    assert tasks[0].metadata["reward_model"] == VERL[0]["reward_model"]


def test_columns_of_other_names() -> None:
    rows = [{"text": "p", "info": {"label": {"value": 7}}, "prompt": "not this", "key": "x", "a.b": 1}]
    columns = {"prompt": "text", "answer": "info.label.value", "id": "key", "metadata": "info"}
    (task,) = rft.TaskSet(rows, columns=columns).read()
    assert task == Task("p", 7, "x", {"label": {"value": 7}, "prompt": "not this", "a.b": 1})
    (task,) = rft.TaskSet({"text": ["p"], "a.b": [1]}, columns={"prompt": "text", "answer": "a.b"}).read()
    assert task == Task("p", 1, "0")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"promt": "text"}, r"a task has no promt; give a column for prompt, answer, id, metadata"),
        ({"prompt": "txt"}, r"tasks\[0\]: no `txt`, which columns=.* names as the prompt.* it has text, label"),
        ({"prompt": "text", "answer": "lable"}, r"columns=\{'answer': 'lable'\}: the first 1 rows of tasks have no .*"),
    ],
)
def test_columns_that_are_not_there(columns: dict[str, str], words: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=words):
        rft.TaskSet([{"text": "p", "label": 1}], columns=columns).read()


def test_what_arrow_fills_in_is_dropped_at_every_depth_and_a_missing_answer_is_missed() -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    rows = [
        {"prompt": [{"role": "user", "content": "p"}], "answer": "2", "x": {"a": 1}},
        {"prompt": [{"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "3"}], "x": {"b": [None]}},
    ]
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist()[0]["x"] == {"a": 1, "b": None}  # filled in
    tasks = list(rft.TaskSet(table).read())
    assert [task.prompt for task in tasks] == [row["prompt"] for row in rows]
    assert [task.metadata for task in tasks] == [{"x": {"a": 1}}, {"x": {"b": [None]}}]
    with pytest.raises(rft.ConfigurationError, match="task '1' has none: set its `answer`"):
        check_answers(exact_match, tasks)


def test_content_given_as_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]}]
    for source in ([{"messages": parts}], pyarrow.Table.from_pylist([{"messages": parts}])):
        assert rft.TaskSet(source).read()[0].prompt == parts  # type: ignore[index]


def test_a_list_keeps_its_none() -> None:
    (task,) = as_tasks([{"prompt": "p", "x": {"a": None}}])
    assert task.metadata == {"x": {"a": None}}


# What comes after the first 10,000


def long_file(folder: Path, count: int, bad: dict[int, bytes]) -> Path:
    path = folder / "long.jsonl"
    lines = (bad.get(i, b'{"prompt": "p%d", "answer": "a"}' % i) for i in range(count))
    path.write_bytes(b"\n\n".join(lines) + b"\n")
    return path


def test_the_first_rows_are_checked_at_once_and_the_others_when_they_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"line 19999: not JSON"):
        rft.TaskSet(long_file(tmp_path, 10_010, {9_999: b"{"})).read()
    bad = {10_000: b"{", 10_003: b'{"answer": 1}', 10_004: b"\xff"}
    tasks = rft.TaskSet(long_file(tmp_path, 10_010, bad)).read()
    assert len(tasks) == 10_010 and known(tasks) == []  # type: ignore[arg-type]
    cursor = TaskCursor(TaskPlan(tasks, 1, 10_010, shuffle=False, seed=0))
    seen = [cursor.task(GroupKey(batch, 0)).id for batch in range(10_010)]
    assert seen[9_998:] == [*("9998", "9999", "10001", "10002", "10005", "10006", "10007", "10008", "10009"), *"012"]
    assert cursor.left_out == 3
    state = cursor.state_dict()
    assert [record.message.split(":")[0] for record in caplog.records] == ["left out"] * 3
    assert f"{tmp_path}/long.jsonl, line 20001: not JSON" in caplog.text
    assert TaskCursor(cursor.plan, json.loads(json.dumps(state))).task(GroupKey(10_000, 0)).id == "10001"


def test_a_list_that_is_bad_throughout_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    tasks = rft.TaskSet([*("p" for _ in range(10_000)), *(" " for _ in range(200))]).read()
    cursor = TaskCursor(TaskPlan(tasks, 1, 10_200, shuffle=False, seed=0))
    cursor.task(GroupKey(9_999, 0))
    with (
        caplog.at_level(logging.CRITICAL),
        pytest.raises(rft.ConfigurationError, match=r"tasks\[10099\]: the prompt is"),
    ):
        cursor.task(GroupKey(10_000, 0))


# The command line


@pytest.mark.parametrize(
    "value",
    [
        {"source": "openai/gsm8k", "name": "main", "split": "train", "columns": {"prompt": "question"}},
        {"source": "tasks.jsonl", "curriculum": {"key": "level", "levels": ["easy", "hard"]}},
        {"source": "tasks.jsonl", "curriculum": {"target": 0.3}, "shuffle": False},
        {"source": "owner/name", "streaming": True, "steps_per_epoch": 9},
        {"sources": {"a": "a.jsonl", "b": {"source": "owner/b", "split": "test"}}, "weights": {"a": 1, "b": 3}},
        "openai/gsm8k",
    ],
)
def test_all_of_it_can_be_said_in_a_config(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tasks", type=rft.TaskSet | rft.Mixture | Tasks)
    parsed = parser.parse_object({"tasks": value})
    assert parser.parse_string(parser.dump(parsed)) == parsed
    tasks = parser.instantiate(parsed).tasks
    if isinstance(value, str):
        assert tasks == value
    elif "sources" in value:
        assert isinstance(tasks, rft.Mixture) and isinstance(tasks.sources["b"], rft.TaskSet)
        assert tasks.sources["b"].split == "test" and tasks.weights == {"a": 1, "b": 3}
    else:
        assert isinstance(tasks, rft.TaskSet)
        curriculum = {"key": rft.ByDifficulty, "target": rft.ByPassRate}
        expected = next((kind for key, kind in curriculum.items() if key in value.get("curriculum", {})), type(None))
        assert isinstance(tasks.curriculum, expected)
        for name in value.keys() - {"curriculum"}:
            assert getattr(tasks, name) == value[name]
