"""What users may write as tasks, and the plan that gives each task its place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any
from weakref import WeakSet

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import GroupKey, Task
from lightning_rft.tasks.plan import TaskCursor, TaskPlan
from lightning_rft.tasks.sources import as_tasks, read_jsonl, reasoning_gym_tasks
from lightning_rft.tasks.task_set import TaskSet, read_tasks

ROOT = Path(__file__).parents[1]
CHAT = [{"role": "user", "content": "hi"}]


def test_as_tasks_takes_all_forms() -> None:
    forms: list[Any] = [
        "plain",
        {"prompt": CHAT, "answer": 3, "id": 7, "metadata": {"a": 1}, "b": 2},
        {"question": "q", "id": None, "metadata": None},
        {"prompt": "p", "question": "kept"},
        Task("t", id="mine"),
        Task("t", answer="x"),
    ]
    assert as_tasks(iter(forms)) == [
        Task("plain", id="0"),
        Task(CHAT, answer=3, id="7", metadata={"a": 1, "b": 2}),
        Task("q", id="2"),
        Task("p", id="3", metadata={"question": "kept"}),
        Task("t", id="mine"),
        Task("t", answer="x", id="5"),
    ]


@pytest.mark.parametrize("name", ["prompt", "question"])
def test_columns_and_tables_are_read_row_by_row(name: str) -> None:
    rows = [{name: "p", "answer": 1, "level": "easy"}, {name: "q", "answer": 2, "level": "hard"}]
    columns = {name: ("p", "q"), "answer": [1, 2], "level": ["easy", "hard"]}
    expected = as_tasks(rows)
    assert as_tasks(columns) == read_tasks(columns, "tasks") == list(TaskSet(columns).read()) == expected
    assert as_tasks({name: [CHAT, "q"], "answer": [1, 2]})[0].prompt == CHAT


def test_a_table_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    (task, _) = as_tasks(pandas.DataFrame({"prompt": ["p", "q"], "answer": [1, None]}))
    assert (task.prompt, task.answer) == ("p", 1)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([], "val_tasks is empty"),
        ("one prompt", "val_tasks is a str: give a list"),
        ({"prompt": "p"}, "val_tasks is a dict: give a list of tasks, even for a single one"),
        ({"prompt": CHAT, "answer": 1}, "val_tasks is a dict: give a list of tasks, even for a single one"),
        ({"prompt": CHAT, "answer": [1]}, "val_tasks is a dict: give a list of tasks, even for a single one"),
        ({"prompt": ["p", "q"], "answer": [1]}, "val_tasks is a dict: .* or columns that are equally long"),
        ({"prompt": ["p", "q"], "answer": 1}, "val_tasks is a dict: .* or columns that are equally long"),
        ({"train": ["p"]}, "val_tasks is a dict: give a list"),
        (Task("p"), "val_tasks is a Task: give a list"),
        (3, "val_tasks is a int: give a list"),
        (["a", 3], r"val_tasks\[1\] is a int; give a Task"),
        (["a", {"answer": 1}], r"val_tasks\[1\]: no `prompt` \(or `messages`, `question`, .*\); give"),
        (["a", " \n"], r"val_tasks\[1\]: the prompt is blank"),
        (["a", {"prompt": []}], r"val_tasks\[1\]: the prompt has no messages"),
        (["a", Task(7)], r"val_tasks\[1\]: the prompt is a int"),  # type: ignore[arg-type]
        (["a", Task([*CHAT, {"role": "user"}])], r"val_tasks\[1\]: message 1 of the prompt lacks role or content"),
        (["a", Task(["hi"])], r"val_tasks\[1\]: message 0 of the prompt"),  # type: ignore[list-item]
        (["a", {"prompt": "p", "metadata": 3}], r"val_tasks\[1\]: metadata is a int"),
        (["a", "b\ud800"], r"val_tasks\[1\]: the prompt has a lone surrogate at character 1"),
        (["a", {"prompt": "p", "id": "\udcff"}], r"val_tasks\[1\]: the id has a lone surrogate at character 0"),
        (["a", Task([{"role": "user", "content": "\ud800"}])], r"val_tasks\[1\]: message 0 of the prompt has a lone"),
        (["a", Task([{"role": "user", "content": None}])], r"val_tasks\[1\]: message 0 of the prompt has no content"),
        (
            ["a", Task([{"role": "user", "content": [{"type": "image"}]}])],
            r"val_tasks\[1\]: the content of message 0 of the prompt is neither text nor a list of parts",
        ),
        (["a", Task("p", answer=Lock())], r"val_tasks\[1\]: its answer cannot be sent to an explorer .*lock"),
        (["a", Task("p", metadata={"m": [Lock()]})], r"val_tasks\[1\]: its metadata cannot be sent to an explorer"),
        ([Task("a", id="x"), "b", Task("a", id="x")], r"val_tasks\[2\] has the id 'x' of val_tasks\[0\]: make ids"),
        ([Task("a", id="1"), "b"], r"val_tasks\[1\] has the id '1' of val_tasks\[0\]"),
    ],
)
def test_as_tasks_says_what_is_wrong(tasks: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        as_tasks(tasks, setting="val_tasks")


def test_read_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        '\ufeff{"question": "2 + 2 =", "answer": 4, "level": 1}\n\n"pläin"\r\n{"prompt": "p", "id": 9}', "utf-8"
    )
    assert read_jsonl(path) == [Task("2 + 2 =", answer=4, metadata={"level": 1}), Task("pläin"), Task("p", id="9")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'"a"\n\n{"prompt"', "line 3: not JSON"),
        (b'"a"\n{"answer": 1}', "line 2: no `prompt`"),
        (b'"a"\n[1]', "line 2 is a list"),
        (b"\n", "has no tasks"),
        (b"\xff\xfe\xfa", "cannot be read .*UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_read_jsonl_says_which_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "tasks.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=words) as error:
        read_jsonl(path)
    assert str(path) in str(error.value)


def test_reasoning_gym_tasks() -> None:
    pytest.importorskip("reasoning_gym")
    tasks = reasoning_gym_tasks("basic_arithmetic", 3, 1, max_terms=2, template="Think {hard}. {question}")
    assert tasks == reasoning_gym_tasks("basic_arithmetic", 3, 1, max_terms=2, template="Think {hard}. {question}")
    assert tasks != reasoning_gym_tasks("basic_arithmetic", 3, 2, max_terms=2, template="Think {hard}. {question}")
    assert len(tasks) == 3 and len(as_tasks(tasks)) == 3
    for task in tasks:
        assert not isinstance(task.prompt, str) and len(task.prompt) == 1
        message = task.prompt[0]
        assert message["role"] == "user" and message["content"].startswith("Think {hard}. Calculate ")
        assert task.metadata["dataset"] == "basic_arithmetic" and task.metadata["num_terms"] == 2
        assert eval(task.metadata["expression"]) == int(task.answer)
    (plain,) = reasoning_gym_tasks("basic_arithmetic", 1, 1, max_terms=2)
    assert plain.prompt[0]["content"] == tasks[0].prompt[0]["content"].removeprefix("Think {hard}. ")  # type: ignore


def test_reasoning_gym_tasks_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigurationError, match=r"'basic_aritmetic' is no dataset .* basic_arithmetic"):
        reasoning_gym_tasks("basic_aritmetic", 1, 1)
    with pytest.raises(ConfigurationError, match=r"put \{question\} in it"):
        reasoning_gym_tasks("basic_arithmetic", 1, 1, template="hello")
    for config in ({"max_terms": 0}, {"colour": "red"}):
        with pytest.raises(ConfigurationError, match="refuses the settings"):
            reasoning_gym_tasks("basic_arithmetic", 1, 1, **config)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigurationError, match="pip install reasoning-gym"):
        reasoning_gym_tasks("basic_arithmetic", 1, 1)


def make_plan(n: int, tasks_per_step: int, limit: int | None = None, shuffle: bool = True, **rest: Any) -> TaskPlan:
    tasks = as_tasks([f"prompt {i}" for i in range(n)])
    batches = TaskPlan.batches(n, tasks_per_step) if limit is None else limit
    return TaskPlan(tasks, tasks_per_step, batches, shuffle, rest.pop("seed", 0), **rest)


def keys_of(plan: TaskPlan, batches: range) -> list[GroupKey]:
    return [GroupKey(batch, slot) for batch in batches for slot in range(plan.size(batch))]


def epoch_ids(plan: TaskPlan, epoch: int) -> list[str]:
    cursor = TaskCursor(plan)
    start = plan.first_batch + (epoch - plan.first_epoch) * plan.batches_per_epoch
    keys = keys_of(plan, range(start, start + plan.batches_per_epoch))
    assert {cursor.epoch(key) for key in keys} == {epoch}
    return [cursor.task(key).id for key in keys]


@settings(deadline=None)
@given(
    n=st.integers(1, 40),
    tasks_per_step=st.integers(1, 12),
    shuffle=st.booleans(),
    seed=st.integers(-(2**40), 2**40),
    first_batch=st.integers(0, 9),
    first_epoch=st.integers(0, 9),
)
def test_every_task_once_an_epoch(
    n: int, tasks_per_step: int, shuffle: bool, seed: int, first_batch: int, first_epoch: int
) -> None:
    plan = make_plan(n, tasks_per_step, None, shuffle, seed=seed, first_batch=first_batch, first_epoch=first_epoch)
    everything = [str(i) for i in range(n)]
    for epoch in range(first_epoch, first_epoch + 3):
        ids = epoch_ids(plan, epoch)
        assert sorted(ids, key=int) == everything
        assert shuffle or ids == everything
    last = first_batch + plan.batches_per_epoch - 1
    sizes = [plan.size(batch) for batch in range(first_batch, last + 1)]
    assert sizes[:-1] == [tasks_per_step] * (len(sizes) - 1) and sum(sizes) == n and sizes[-1] >= 1
    assert plan.size(last + 1) == sizes[0]
    for batch, slot in ((last, sizes[-1]), (first_batch, -1), (first_batch - 1, 0)):
        with pytest.raises(ScheduleError, match="is not planned"):
            TaskCursor(plan).task(GroupKey(batch, slot))


@settings(deadline=None)
@given(n=st.integers(2, 30), tasks_per_step=st.integers(1, 6), epoch=st.integers(0, 5), data=st.data())
def test_a_limit_cuts_each_epoch_and_changes_no_order(n: int, tasks_per_step: int, epoch: int, data: Any) -> None:
    whole = make_plan(n, tasks_per_step)
    cut = make_plan(n, tasks_per_step, data.draw(st.integers(1, whole.batches_per_epoch)))
    assert epoch_ids(cut, epoch) == epoch_ids(whole, epoch)[: cut.batches_per_epoch * tasks_per_step]


def test_a_plan_that_starts_later_goes_on_alike() -> None:
    plan = make_plan(10, 4)
    cursor, later = TaskCursor(plan), TaskCursor(make_plan(10, 4, first_batch=6, first_epoch=2))
    for key in keys_of(plan, range(6, 15)):
        assert cursor.task(key) == later.task(key)
        assert cursor.sample_seed(key, 3) == later.sample_seed(key, 3)


def test_orders_depend_on_seed_and_epoch() -> None:
    orders = {tuple(epoch_ids(make_plan(20, 3, seed=seed), epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_orders_and_seeds_are_pinned() -> None:
    """A change of these numbers breaks the resume of every run that exists."""
    plan = make_plan(10, 4, seed=1234)
    assert epoch_ids(plan, 0) == list("3914870256")
    assert epoch_ids(plan, 1) == list("7920681543")
    cursor = TaskCursor(plan)
    assert [cursor.sample_seed(GroupKey(0, 0), sample) for sample in range(3)] == [760267532, 1800382667, 473172772]


def test_orders_and_seeds_are_those_of_another_process() -> None:
    code = (
        "from lightning_rft.tasks.sources import *; from lightning_rft.tasks.plan import *\n"
        "from lightning_rft.experience import GroupKey\n"
        "p = TaskCursor(TaskPlan(as_tasks(['x'] * 9), 9, 1, True, 5))\n"
        "print([(p.task(GroupKey(3, i)).id, p.sample_seed(GroupKey(3, i), 1)) for i in range(9)])"
    )
    environment = {"PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    cursor = TaskCursor(TaskPlan(as_tasks(["x"] * 9), 9, 1, True, 5))
    here = [(cursor.task(GroupKey(3, i)).id, cursor.sample_seed(GroupKey(3, i), 1)) for i in range(9)]
    assert output.stdout.strip() == str(here)


def test_sample_seeds_differ_and_fit_31_bits() -> None:
    cursors = [TaskCursor(make_plan(6, 2, seed=seed)) for seed in range(3)]
    seeds = [
        cursor.sample_seed(GroupKey(batch, slot), sample)
        for cursor in cursors
        for batch in range(6)
        for slot in range(2)
        for sample in range(8)
    ]
    assert len(set(seeds)) == len(seeds) == 3 * 6 * 2 * 8
    assert all(0 <= seed < 2**31 for seed in seeds) and max(seeds) > 2**30


def test_sample_seed_follows_the_task_not_its_place() -> None:
    by_four, by_one = TaskCursor(make_plan(8, 4)), TaskCursor(make_plan(8, 1))
    assert by_four.task(GroupKey(1, 2)) == by_one.task(GroupKey(6, 0))
    assert by_four.sample_seed(GroupKey(1, 2), 5) == by_one.sample_seed(GroupKey(6, 0), 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], 1, 1, False, 0), "tasks is empty"),
        ((as_tasks(["a", "b", "c"]), 0, 1, False, 0), "tasks_per_step is 0"),
        ((as_tasks(["a", "b", "c"]), 2, 3, False, 0), "batches_per_epoch is 3: 3 tasks, 2 a step, make 2; set 1 to 2"),
        ((as_tasks(["a", "b", "c"]), 2, 0, False, 0), "batches_per_epoch is 0"),
    ],
)
def test_plans_that_cannot_work(arguments: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        TaskPlan(*arguments)


# Epochs that go on, and streams


@settings(deadline=None)
@given(
    n=st.integers(1, 30),
    tasks_per_step=st.integers(1, 8),
    steps=st.integers(1, 9),
    shuffle=st.booleans(),
    first_epoch=st.integers(0, 5),
)
def test_epochs_of_some_steps_go_on_through_the_tasks(
    n: int, tasks_per_step: int, steps: int, shuffle: bool, first_epoch: int
) -> None:
    plan = make_plan(n, tasks_per_step, steps, shuffle, goes_on=True)
    assert {plan.size(batch) for batch in range(3 * steps)} == {tasks_per_step}
    stream = [plan.at(position) for position in range(3 * n)]
    for number in range(3):
        one_pass = stream[number * n : (number + 1) * n]
        assert {entry[0] for entry in one_pass} == {number}
        assert {entry[1].id for entry in one_pass} == {str(i) for i in range(n)}
        whole = make_plan(n, n, None, shuffle)
        assert [entry[1].id for entry in one_pass] == epoch_ids(whole, number)
    # a fit that begins at a later epoch begins where that would
    later = make_plan(n, tasks_per_step, steps, shuffle, goes_on=True, first_epoch=first_epoch)
    assert later.at(0) == plan.at(first_epoch * steps * tasks_per_step)


def test_five_steps_of_a_thousand_tasks_reach_them_all() -> None:
    plan = make_plan(1000, 4, 5, goes_on=True)
    cursor = TaskCursor(plan)
    keys = keys_of(plan, range(50 * 5))  # 50 epochs
    assert {cursor.task(key).id for key in keys} == {str(i) for i in range(1000)}
    assert len({cursor.sample_seed(key, 0) for key in keys}) == 1000


def stream_plan(source: Any, **rest: int) -> TaskPlan:
    return TaskPlan(TaskSet(source, steps_per_epoch=2).read(), 3, 2, True, 0, goes_on=True, **rest)


def test_an_endless_stream_goes_on_and_is_resumed() -> None:
    read = count()

    def source() -> Iterator[str]:
        for index in read:
            yield f"prompt {index}"

    cursor = TaskCursor(stream_plan(source()))
    keys = keys_of(cursor.plan, range(6))  # three epochs
    assert [cursor.task(key).id for key in keys] == [str(index) for index in range(18)]
    assert next(read) == 18  # no more were read than were needed
    for key in keys[:7]:
        cursor.done(key)
    resumed = TaskCursor(
        stream_plan(f"prompt {index}" for index in count()), json.loads(json.dumps(cursor.state_dict()))
    )
    later = keys_of(cursor.plan, range(6, 9))
    for key in [*keys[7:], *later]:
        assert resumed.task(key) == Task(f"prompt {cursor.task(key).id}", id=cursor.task(key).id)
        assert resumed.sample_seed(key, 1) == cursor.sample_seed(key, 1)


def test_a_stream_that_ends_begins_again_with_other_seeds(caplog: pytest.LogCaptureFixture) -> None:
    cursor = TaskCursor(stream_plan(iter(["a", " ", {"prompt": "c", "id": "x"}])))
    keys = keys_of(cursor.plan, range(2))
    assert [cursor.task(key).id for key in keys] == ["0", "x"] * 3
    assert len({cursor.epoch(key) for key in keys}) == 6  # so that each task ends once, under its number
    assert len({cursor.sample_seed(key, 0) for key in keys}) == 6
    assert [record.message for record in caplog.records] == [
        "left out: tasks[1]: the prompt is blank; give text, or chat messages with `role` and `content`"
    ]
    with pytest.raises(ConfigurationError, match="tasks is empty"):
        stream_plan(iter([])).at(0)


class Anew:
    """A source without a length that begins anew with every loop, and the tasks of it that are alive."""

    def __init__(self, end: int | None = None) -> None:
        self.end = end
        self.alive: WeakSet[Task] = WeakSet()

    def __iter__(self) -> Iterator[Task]:
        for index in count() if self.end is None else range(self.end):
            task = Identified(f"prompt {index}", id=str(index))
            self.alive.add(task)
            yield task


class Identified(Task):
    __hash__ = object.__hash__


@pytest.mark.parametrize("once", [False, True], ids=["anew", "once"])
def test_a_stream_keeps_what_can_be_asked_for_and_no_more(once: bool) -> None:
    source = Anew()
    cursor = TaskCursor(stream_plan(iter(source) if once else source))
    straggler, most = GroupKey(0, 1), 0
    for key in keys_of(cursor.plan, range(100_000 // 3)):
        assert cursor.task(key).id == str(key.batch * 3 + key.slot)
        if key != straggler:
            cursor.done(key)
        if key == (100, 0):  # a group that comes back late, is issued again, and is trained
            assert cursor.task(straggler).id == "1"
            cursor.done(straggler)
        most = max(most, len(source.alive))
    assert most < (10_010 if once else 310)  # an iterator's are remembered, in case that it ends
    assert len(source.alive) < 5
    resumed = TaskCursor(stream_plan(source), json.loads(json.dumps(cursor.state_dict())))
    assert resumed.task(GroupKey(33_333, 0)).id == "99999"
    assert len(source.alive) < 10


def test_a_source_that_begins_anew_is_read_again_for_another_run(caplog: pytest.LogCaptureFixture) -> None:
    source = Anew(end=10)
    stream = TaskSet(source, steps_per_epoch=2).read()
    for _ in range(2):
        cursor = TaskCursor(TaskPlan(stream, 3, 2, True, 0, goes_on=True))
        keys = keys_of(cursor.plan, range(8))
        for position, key in enumerate(keys):
            assert cursor.task(key).id == str(position % 10)
            cursor.done(key)
        assert len(source.alive) < 5
    blank = Blanks()
    stream = TaskSet(blank, steps_per_epoch=2).read()
    for position in (0, 5, 0):
        assert stream.at(position).prompt == "a"
    assert len(caplog.records) == 1  # in the first pass


class Blanks:
    def __iter__(self) -> Iterator[str]:
        return iter(["a", " "])


def test_a_long_iterator_is_not_read_again() -> None:
    def fresh(length: int) -> TaskPlan:
        return stream_plan(str(index) for index in range(length))

    again = fresh(10_000)
    assert [again.at(position)[1].prompt for position in (9_999, 10_000, 25_000, 3)] == ["9999", "0", "5000", "3"]
    over = fresh(10_001)
    over.forget(5_000)
    over.at(10_000)
    for position in (10_001, 4_999):  # the end, and another run
        with pytest.raises(
            ConfigurationError, match=r"an iterator, which cannot begin again, .* class with `__iter__`"
        ):
            over.at(position)
    assert fresh(10_001).at(10_000)[1].prompt == "10000"


# The cursor


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 12),
    tasks_per_step=st.integers(1, 5),
    steps=st.none() | st.integers(1, 7),
    shuffle=st.booleans(),
    first_batch=st.integers(0, 3),
    seed=st.integers(0, 2**32),
    failing=st.sampled_from([0.0, 0.2, 0.6]),
)
def test_each_task_once_a_pass_through_replacements_and_resumes(
    n: int, tasks_per_step: int, steps: int | None, shuffle: bool, first_batch: int, seed: int, failing: float
) -> None:
    going = {"goes_on": steps is not None}
    plan = make_plan(n, tasks_per_step, steps, shuffle, first_batch=first_batch, first_epoch=2, **going)
    cursor, randomness = TaskCursor(plan), Random(seed)
    answered: dict[GroupKey, tuple[int, str]] = {}
    ended: list[tuple[int, str]] = []
    running: list[GroupKey] = []
    keys = keys_of(plan, range(first_batch, first_batch + 3 * plan.batches_per_epoch))
    waiting = list(keys)
    while waiting or running:
        if waiting and (not running or randomness.random() < 0.5):
            # the schedule issues in order; who asks for a later one first, as a resume does, changes nothing
            if randomness.random() < 0.2:
                cursor.task(randomness.choice(waiting[:3]))
            running.append(waiting.pop(0))
            continue
        key = randomness.choice(running)
        ended.append((cursor.epoch(key), cursor.task(key).id))
        if randomness.random() < failing:
            before = cursor.task(key)
            cursor.replace(key)
            assert cursor.task(key) != before or cursor.epoch(key) > ended[-1][0]
        else:
            running.remove(key)
            cursor.done(key)
            answered[key] = ended[-1]
            with pytest.raises(ScheduleError, match="is done"):
                cursor.task(key)
        if randomness.random() < 0.2:
            state = cursor.state_dict()
            elsewhere = make_plan(n, tasks_per_step, steps, shuffle, first_batch=9, first_epoch=9, **going)
            cursor = TaskCursor(elsewhere, json.loads(json.dumps(state)))
            assert cursor.state_dict() == state
            assert len(state["positions"]) <= len(running) + 3

    assert len(set(ended)) == len(ended)  # each once
    stream = [(epoch, task.id) for epoch, task in map(plan.at, range(len(ended)))]
    assert sorted(ended) == sorted(stream)  # and none left out
    assert failing or stream == [answered[key] for key in keys]


def test_a_replacement_shifts_what_comes_later_by_one() -> None:
    cursor = TaskCursor(make_plan(5, 2, shuffle=False))
    assert cursor.task(GroupKey(0, 1)).id == "1"
    seed = cursor.sample_seed(GroupKey(0, 1), 0)
    cursor.replace(GroupKey(0, 1))
    assert cursor.sample_seed(GroupKey(0, 1), 0) != seed
    later = keys_of(cursor.plan, range(6))
    assert [cursor.task(key).id for key in later] == ["0", "2", "3", "4", "0", "1", "2", "3", "4", "0"]
    assert [cursor.epoch(key) for key in later] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]


def test_a_limit_leaves_the_same_tasks_out_of_the_stream() -> None:
    plan = make_plan(7, 2, 2)
    assert [task.id for _, task in map(plan.at, range(8))] == epoch_ids(plan, 0) + epoch_ids(plan, 1)


def test_what_a_cursor_refuses() -> None:
    cursor = TaskCursor(make_plan(5, 2))
    with pytest.raises(ScheduleError, match="it has no task"):
        cursor.done(GroupKey(0, 0))
    with pytest.raises(ScheduleError, match=r"\(2, 1\) is not planned: batch 2 has 1 groups"):
        cursor.replace(GroupKey(2, 1))
    cursor.task(GroupKey(0, 1))
    cursor.done(GroupKey(0, 1))
    with pytest.raises(ScheduleError, match=r"\(0, 1\) is done"):
        cursor.replace(GroupKey(0, 1))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_plan(6, 2, 2), "tasks is '6 tasks .*, but '5 tasks .* in the checkpoint: .* without ckpt_path"),
        (make_plan(5, 3, 2), "tasks_per_step is 3, but 2 in the checkpoint"),
        (make_plan(5, 2, 3), "batches_per_epoch .*limit_train_batches.* is 3, but 2 in"),
        (make_plan(5, 2, 2, False), "shuffle is False, but True"),
        (make_plan(5, 2, 2, seed=4), "seed is 4, but 0"),
        (
            make_plan(5, 2, 2, goes_on=True),
            r"goes_on \(true with TaskSet\(steps_.*\)\) is True, but False",
        ),
        (TaskPlan(as_tasks([Task("p", id=name) for name in "01243"]), 2, 2, True, 0), "ids of digest"),
    ],
)
def test_a_cursor_goes_on_only_with_the_same_settings(other: TaskPlan, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        TaskCursor(other, TaskCursor(make_plan(5, 2, 2)).state_dict())
