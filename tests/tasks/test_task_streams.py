"""Streams: read once, as they are needed, and gone on with after a resume without reading all of it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import lightning_rft as rft
from lightning_rft.experience import GroupKey
from lightning_rft.tasks.plan import TaskCursor, TaskPlan

datasets = pytest.importorskip("datasets")

COUNT = 5_000


class Stateful:
    """A source that can be set to where it was."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read: list[int] = []
        self._next = self._start = 0

    def __iter__(self) -> Iterator[Any]:
        self._next, self._start = self._start, 0
        while self._next < self.count:
            index = self._next
            self._next += 1
            self.read.append(index)
            yield " " if index % 10 == 3 else f"prompt {index}"

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["next"]


def streamed(read: list[int], shards: int = 4, **shuffle: Any) -> Any:
    """A stream of ``datasets``, and what is read of it."""

    def note(row: dict[str, Any], index: int) -> dict[str, Any]:
        read.append(index)
        return {"prompt": row["question"], "extra": {"index": index, "even": 1 if index % 2 == 0 else None}}

    data = datasets.Dataset.from_dict({"question": [f"prompt {i}" for i in range(COUNT)]})
    stream = data.to_iterable_dataset(num_shards=shards).map(note, with_indices=True, remove_columns=["question"])
    return stream.shuffle(**shuffle) if shuffle else stream


def cursor_of(source: Any, state: Any = None) -> TaskCursor:
    plan = TaskPlan(rft.TaskSet(source, steps_per_epoch=5).read(), 4, 5, True, 0, goes_on=True)
    return TaskCursor(plan, None if state is None else json.loads(json.dumps(state)))


def keys(batches: range) -> list[GroupKey]:
    return [GroupKey(batch, slot) for batch in batches for slot in range(4)]


def advanced(cursor: TaskCursor, batches: range, straggler: GroupKey | None = None) -> list[str]:
    ids = []
    for key in keys(batches):
        ids.append(cursor.task(key).id)
        if key != straggler:
            cursor.done(key)
    return ids


@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("kind", ["datasets", "own"])
def test_a_source_with_a_state_is_not_read_again(kind: str, passes: int) -> None:
    read: list[int] = []
    source = Stateful(COUNT) if kind == "own" else streamed(read)
    read = source.read if isinstance(source, Stateful) else read
    first = cursor_of(source)
    size = len({first.plan.lane.at(position).id for position in range(COUNT)}) if kind == "own" else COUNT
    first = cursor_of(source)
    batches = passes * size // 4 + 1000
    straggler = GroupKey(batches - 20, 1)
    advanced(first, range(batches), straggler)
    state = first.state_dict()
    following = advanced(first, range(batches, batches + 500))

    read.clear()
    fresh = Stateful(COUNT) if kind == "own" else streamed(read)
    resumed = cursor_of(fresh, state)
    assert resumed.state_dict()["positions"] == state["positions"]
    assert resumed.task(straggler) == first.task(straggler)
    assert len(fresh.read if isinstance(fresh, Stateful) else read) < 200
    assert advanced(resumed, range(batches, batches + 500)) == following
    again = cursor_of(fresh, resumed.state_dict())  # a resumed run's own checkpoint, of the same object
    more = range(batches + 500, batches + 510)
    assert advanced(again, more) == advanced(resumed, more)
    assert cursor_of(fresh).task(GroupKey(0, 0)).id == "0"  # another run


def test_a_stream_in_random_order_is_read_again_since_its_state_would_lose_tasks() -> None:
    read: list[int] = []
    first = cursor_of(streamed(read, seed=3, buffer_size=100))
    before = advanced(first, range(100))
    state = first.state_dict()
    resumed = cursor_of(streamed(read, seed=3, buffer_size=100), state)
    after = advanced(resumed, range(100, COUNT // 4))
    assert sorted(map(int, before + after)) == list(range(COUNT))
    assert before + after == advanced(cursor_of(streamed(read, seed=3, buffer_size=100)), range(COUNT // 4))


def test_rows_of_a_stream_are_tasks_as_those_of_a_table_are() -> None:
    cursor = cursor_of(streamed([]))
    assert cursor.task(GroupKey(0, 1)).prompt == "prompt 1"
    assert [cursor.task(GroupKey(0, slot)).metadata for slot in range(2)] == [
        {"extra": {"index": 0, "even": 1}},
        {"extra": {"index": 1}},
    ]
    renamed = rft.TaskSet(iter([{"text": "p", "label": 3}]), steps_per_epoch=1, columns={"prompt": "text"}).read()
    assert (renamed.at(0).prompt, renamed.at(0).metadata) == ("p", {"label": 3})  # type: ignore[union-attr]


def test_a_stream_without_a_task_ends_soon() -> None:
    read: list[int] = []
    source = rft.TaskSet(streamed(read), steps_per_epoch=1, columns={"prompt": "nowhere"}).read()
    with pytest.raises(rft.ConfigurationError, match=r"tasks\[99\]: no `nowhere`, which columns=.* has prompt, extra"):
        source.at(0)  # type: ignore[union-attr]
    assert len(read) < 200
