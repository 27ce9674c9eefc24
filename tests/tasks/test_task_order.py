"""Orders that are computed position by position: permutations, curricula and mixtures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_rft as rft
from lightning_rft.experience import GroupKey
from lightning_rft.tasks.chance import key_of, permute
from lightning_rft.tasks.plan import TaskCursor, TaskPlan

ROOT = Path(__file__).parents[2]


# Permutations


@settings(deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 2**64))
def test_a_permutation_has_everything_once(count: int, seed: int) -> None:
    assert sorted(permute(position, count, key_of(seed)) for position in range(count)) == list(range(count))


@settings(deadline=None)
@given(count=st.integers(1, 2**40), data=st.data())
def test_a_permutation_of_many_stays_inside_and_sends_no_two_to_one_place(count: int, data: Any) -> None:
    positions = data.draw(st.sets(st.integers(0, count - 1), max_size=20))
    images = {permute(position, count, key_of("large")) for position in positions}
    assert len(images) == len(positions) and all(0 <= image < count for image in images)


def test_permutations_of_different_keys_are_independent() -> None:
    """Each value is equally often at each position: 5,000 keys, 7 x 7 counts, each within five standard deviations."""
    counts = Counter((at, permute(at, 7, key_of("key", number))) for number in range(5_000) for at in range(7))
    mean, deviation = 5_000 / 7, (5_000 * 1 / 7 * 6 / 7) ** 0.5
    assert len(counts) == 49 and all(abs(count - mean) < 5 * deviation for count in counts.values())
    orders = Counter(tuple(permute(at, 4, key_of("key", number)) for at in range(4)) for number in range(5_000))
    assert len(orders) == 24  # all there are


def test_a_permutation_is_that_of_another_process() -> None:
    code = "from lightning_rft.tasks.chance import *; print([permute(i, 1000, key_of('x', 3)) for i in range(1000)])"
    environment = {"PYTHONHASHSEED": "5", "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(output.stdout) == [permute(index, 1000, key_of("x", 3)) for index in range(1000)]


# Plans of curricula and mixtures


def planned(tasks: rft.TaskSet | rft.Mixture, tasks_per_step: int = 3, steps: int = 4, seed: int = 0) -> TaskPlan:
    goes_on = tasks.goes_on
    return TaskPlan(tasks.read(), tasks_per_step, steps, shuffle=tasks.shuffle, seed=seed, goes_on=goes_on)


def levels(plan: TaskPlan, count: int) -> list[Any]:
    return [plan.at(position)[1].metadata["level"] for position in range(count)]


ROWS = [{"prompt": f"p{i}", "level": (i * 7) % 5, "info": {"level": i}} for i in range(40)]


def test_by_difficulty_each_pass_goes_from_easy_to_hard() -> None:
    plan = planned(rft.TaskSet(ROWS, steps_per_epoch=4, curriculum=rft.ByDifficulty("level")))
    one_pass = [level for level in range(5) for _ in range(8)]
    assert levels(plan, 120) == one_pass * 3
    orders = [tuple(plan.at(number * 40 + index)[1].id for index in range(40)) for number in range(3)]
    assert len(set(orders)) == 3 and all(len(set(order)) == 40 for order in orders)  # equal ones in new order
    kept = planned(rft.TaskSet(ROWS, False, curriculum=rft.ByDifficulty("level")), 10)
    assert [kept.at(position)[1].id for position in range(8)] == [str(i) for i in range(40) if i * 7 % 5 == 0]


def test_difficulties_of_all_kinds() -> None:
    named = [{"prompt": "p", "level": "hard"}, {"prompt": "p", "level": "easy"}]
    plan = planned(rft.TaskSet(named, curriculum=rft.ByDifficulty("level", ["easy", "hard"])), 1, 2)
    assert levels(plan, 2) == ["easy", "hard"]
    plan = planned(rft.TaskSet(ROWS, curriculum=rft.ByDifficulty("info.level")), 10)
    assert [plan.at(position)[1].id for position in range(40)] == [str(i) for i in range(40)]
    plan = planned(rft.TaskSet(ROWS, curriculum=rft.ByDifficulty(lambda task: -task.metadata["info"]["level"])), 10)
    assert plan.at(0)[1].id == "39"


@pytest.mark.parametrize(
    ("curriculum", "words"),
    [
        (rft.ByDifficulty("level"), r"task '0' has the difficulty 'hard': give a number, or name the values with lev"),
        (rft.ByDifficulty("depth"), "task '0' has the difficulty None"),
        (rft.ByDifficulty("level", ["easy"]), "task '0' has the difficulty 'hard': add it to levels"),
    ],
)
def test_difficulties_that_are_not_known(curriculum: rft.ByDifficulty, words: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=words):
        rft.TaskSet([{"prompt": "p", "level": "hard"}], curriculum=curriculum).read()


def test_what_a_curriculum_needs() -> None:
    with pytest.raises(rft.ConfigurationError, match=r"no length, so TaskSet\(curriculum=...\) cannot sort it"):
        rft.TaskSet(iter(["p"]), steps_per_epoch=1, curriculum=rft.ByPassRate()).read()
    with pytest.raises(rft.ConfigurationError, match=r"target=1.5\) must be from 0 to 1"):
        rft.ByPassRate(1.5)


def test_other_difficulties_are_refused_on_resume() -> None:
    state = TaskCursor(planned(rft.TaskSet(ROWS, curriculum=rft.ByDifficulty("level")), 10)).state_dict()
    for changed in (
        rft.TaskSet([{**row, "level": -row["level"]} for row in ROWS], curriculum=rft.ByDifficulty("level")),
        rft.TaskSet(ROWS),
    ):
        with pytest.raises(rft.ConfigurationError, match=r"^order \(of curriculum=.* in the checkpoint"):
            TaskCursor(planned(changed, 10), state)


def test_a_checkpoint_of_an_older_order_is_refused_and_one_without_goes_on() -> None:
    for shuffle in (True, False):
        state = TaskCursor(planned(rft.TaskSet(ROWS, shuffle), 10)).state_dict()
        del state["order"], state["lane"]  # as version 0.2 had it
        if shuffle:
            with pytest.raises(rft.ConfigurationError, match=r"order .*version of lightning_rft.* is 'permuted', but"):
                TaskCursor(planned(rft.TaskSet(ROWS, shuffle), 10), state)
        else:
            assert TaskCursor(planned(rft.TaskSet(ROWS, shuffle), 10), state).task(GroupKey(0, 3)).id == "3"


def passes_through(tasks: rft.TaskSet | rft.Mixture, seed: int, batches: int, size: int) -> tuple[list[Any], list[Any]]:
    """Ends groups out of order, some by failure, and resumes now and then; returns (pass, id) of each, and states."""
    randomness = Random(seed)
    cursor = TaskCursor(planned(tasks, size))
    waiting = [GroupKey(batch, slot) for batch in range(batches) for slot in range(size)]
    running: list[GroupKey] = []
    issued: dict[GroupKey, tuple[int, str]] = {}
    ended, states = [], []
    while waiting or running:
        if waiting and (not running or randomness.random() < 0.5):
            key = waiting.pop(0)
            issued[key] = (cursor.epoch(key), cursor.task(key).id)
            running.append(key)
            continue
        key = randomness.choice(running)
        assert issued[key] == (cursor.epoch(key), cursor.task(key).id)  # through every resume
        ended.append(issued[key])
        cursor.learn(key, [float(randomness.random() < 0.5) for _ in range(4)])
        if randomness.random() < 0.2:
            cursor.replace(key)
            issued[key] = (cursor.epoch(key), cursor.task(key).id)
        else:
            cursor.done(key)
            running.remove(key)
        if randomness.random() < 0.5:
            cursor.follow()
        if randomness.random() < 0.3:
            state = json.loads(json.dumps(cursor.state_dict()))
            cursor = TaskCursor(planned(tasks, size), state)
            assert cursor.state_dict() == state
            states.append(state)
    return ended, states


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 15), seed=st.integers(0, 2**32), size=st.integers(1, 4))
def test_by_pass_rate_each_task_comes_once_per_pass_through_replacements_and_resumes(
    n: int, seed: int, size: int
) -> None:
    tasks = rft.TaskSet(ROWS[:n], curriculum=rft.ByPassRate())
    ended, _ = passes_through(tasks, seed, batches=3 * n // size + 2, size=size)
    assert len(set(ended)) == len(ended)
    for number in range(len(ended) // n):  # whole passes
        assert {task for epoch, task in ended if epoch == number} == {str(i) for i in range(n)}


def test_by_pass_rate_the_next_task_is_nearest_to_the_target() -> None:
    tasks = rft.TaskSet(ROWS[:5], curriculum=rft.ByPassRate(target=0.5))
    cursor = TaskCursor(planned(tasks, 5, 1))
    passed = {"0": 0, "1": 4, "2": 2, "3": 1, "4": 3}  # of four samples
    first = []
    for slot in range(5):
        key = GroupKey(0, slot)
        task = cursor.task(key).id
        first.append(task)
        cursor.learn(key, [2.0] * passed[task] + [0.5] * (4 - passed[task]))
    cursor.follow()
    assert sorted(first) == list("01234")
    second = [cursor.task(GroupKey(1, slot)).id for slot in range(5)]
    assert second[0] == "2" and set(second[1:3]) == {"3", "4"} and set(second[3:]) == {"0", "1"}


def test_by_pass_rate_a_late_result_counts_from_when_it_comes() -> None:
    tasks = rft.TaskSet(ROWS[:2], curriculum=rft.ByPassRate())
    cursor = TaskCursor(planned(tasks, 1, 2))
    keys = [GroupKey(batch, 0) for batch in range(5)]
    first, second = (cursor.task(key).id for key in keys[:2])
    cursor.learn(keys[0], [1.0, 1.0, 1.0, 0.0])
    cursor.follow()
    assert cursor.task(keys[2]).id == second  # as it is not known yet, it counts as on target
    assert cursor.task(keys[3]).id == first
    for key in keys[1:3]:
        cursor.learn(key, [1.0, 1.0])
    cursor.follow()
    assert cursor.task(keys[4]).id == first  # which is nearer now


def trained(arrivals: Random, refused: int, resumed: set[int]) -> list[list[tuple[int, str]]]:
    """(pass, id) of each batch, whose groups come back in any order, and are refused or not by what they answered."""
    parts = {"rated": rft.TaskSet(ROWS[:9], curriculum=rft.ByPassRate()), "sorted": ROWS[:4]}
    tasks = rft.Mixture(parts, weights={"rated": 2, "sorted": 1})
    cursor, batches = TaskCursor(planned(tasks, 4)), []
    for batch in range(8):
        keys = [GroupKey(batch, slot) for slot in range(4)]
        at_work = [key for key in keys if cursor.task(key)]
        while at_work:
            key = arrivals.choice(at_work)
            answer = Random(repr((cursor.epoch(key), cursor.task(key).id)))
            rewards = [float(answer.random() < 0.5) for _ in range(4)]
            if answer.randrange(10) < refused:
                cursor.learn(key, rewards)
                cursor.replace(key)
                if batch in resumed:
                    cursor = TaskCursor(planned(tasks, 4), json.loads(json.dumps(cursor.state_dict())))
            else:
                at_work.remove(key)
        keys = cursor.in_order(keys)
        batches.append([(cursor.epoch(key), cursor.task(key).id) for key in keys])
        for key in keys:
            cursor.learn(key, [0.0, 1.0])
        cursor.follow()
        for key in keys:
            cursor.done(key)
    return batches


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), refused=st.integers(1, 7), resumed=st.sets(st.integers(0, 7)))
def test_what_is_trained_does_not_depend_on_who_came_back_first(seed: int, refused: int, resumed: set[int]) -> None:
    assert trained(Random(seed), refused, resumed) == trained(Random(0), refused, set())


# Mixtures

PARTS: dict[str, Any] = {"a": ROWS[:7], "b": ["x", "y", "z"], "c": rft.TaskSet(ROWS[:20], shuffle=False)}


def names(plan: TaskPlan, positions: range) -> list[str]:
    return [plan.at(position)[1].metadata["source"] for position in positions]


@settings(deadline=None, max_examples=50)
@given(
    weights=st.fixed_dictionaries(dict.fromkeys(PARTS, st.integers(1, 9) | st.sampled_from([0.5, 1.25, 0.1]))),
    start=st.integers(0, 500),
    length=st.integers(1, 200),
)
def test_proportions_hold_in_any_stretch(weights: dict[str, float], start: int, length: int) -> None:
    plan = planned(rft.Mixture(PARTS, weights))
    counts = Counter(names(plan, range(start, start + length)))
    for name, weight in weights.items():
        assert abs(counts[name] - length * weight / sum(weights.values())) <= 2  # one at either end


def test_each_source_goes_through_its_own_passes() -> None:
    plan = planned(rft.Mixture(PARTS, {"a": 2, "b": 1, "c": 3}))
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in PARTS}
    for position in range(600):
        number, task = plan.at(position)
        name, own = task.id.split("/")
        assert name == task.metadata["source"]
        found[name].append((number, own))
    assert [len(entries) for entries in found.values()] == [200, 100, 300]
    for name, size in {"a": 7, "b": 3, "c": 20}.items():
        for start in range(0, 60, size):
            one_pass = found[name][start : start + size]
            assert {number for number, _ in one_pass} == {start // size}
            assert {own for _, own in one_pass} == {str(i) for i in range(size)}
    assert [own for _, own in found["c"][:20]] == [str(i) for i in range(20)]
    again = planned(rft.Mixture(PARTS, {"a": 2, "b": 1, "c": 3}))
    assert [again.at(position) for position in range(50)] == [plan.at(position) for position in range(50)]
    other = planned(rft.Mixture(PARTS, {"a": 2, "b": 1, "c": 3}), seed=1)
    assert [other.at(position) for position in range(50)] != [plan.at(position) for position in range(50)]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_a_mixture_of_everything_is_resumed_exactly(seed: int) -> None:
    class Endless:
        def __iter__(self) -> Any:
            return iter([f"e{i}" for i in range(50)])

    sources = {**PARTS, "rated": rft.TaskSet(ROWS[:4], curriculum=rft.ByPassRate()), "stream": Endless()}
    tasks = rft.Mixture(sources, steps_per_epoch=3)
    ended, states = passes_through(tasks, seed, batches=20, size=3)
    assert len(set(ended)) == len(ended) and states
    for name in sources:
        of_one = [epoch for epoch, task in ended if task.startswith(f"{name}/")]
        assert len(of_one) >= len(ended) // 5 - 1


def test_an_epoch_of_a_mixture() -> None:
    mixture = rft.Mixture(PARTS, {"a": 1, "b": 1, "c": 2})
    data = rft.RFTDataModule(mixture, reward=lambda c, t: 0.0, engine=rft.FakeEngine(), tasks_per_step=3)
    assert data.steps_per_epoch == 14  # 40 tasks, until all 20 of c were there
    plan = planned(mixture, steps=14)
    ids = {plan.at(position)[1].id for position in range(14 * 3)}
    assert len(ids) == 30
    assert plan.size(13) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({},), "is empty: give at least one source"),
        ((PARTS, {"a": 1, "b": 1}), "give each of a, b, c one weight above 0"),
        ((PARTS, {"a": 1, "b": 1, "c": 0}), "one weight above 0"),
        ((PARTS, {"a": 1, "b": 1, "c": float("nan")}), "one weight above 0"),
        ((PARTS, {"a": 0.333333, "b": 0.333333, "c": 0.333334}), "repeats only after 1000000 tasks: round"),
        ((PARTS, None, 0), "steps_per_epoch=0. must be at least 1"),
        (({"a": rft.TaskSet(["p"], steps_per_epoch=1)},), "leave steps_per_epoch of 'a' out"),
    ],
)
def test_mixtures_that_cannot_be(arguments: Any, words: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=words):
        rft.Mixture(*arguments)


def test_errors_in_a_mixture_name_the_source() -> None:
    with pytest.raises(rft.ConfigurationError, match=r"sources\['b'\]\[1\]: the prompt is blank"):
        rft.Mixture({"a": ["p"], "b": ["p", " "]}).read()
    with pytest.raises(rft.ConfigurationError, match=r"no length: set Mixture\(steps_per_epoch"):
        rft.Mixture({"a": iter(["p"])}).read()


def test_overfitting_repeats_the_first_batch_whatever_the_tasks_are() -> None:
    for tasks in (rft.Mixture(PARTS), rft.TaskSet(iter("abcdef"), steps_per_epoch=9), rft.TaskSet(ROWS)):
        plan = TaskPlan(tasks.read(), 2, 1, shuffle=False, seed=0)
        cursor = TaskCursor(plan)
        keys = [GroupKey(batch, slot) for batch in range(3) for slot in range(2)]
        ids = []
        for key in keys:
            ids.append((cursor.epoch(key), cursor.task(key).id))
            cursor.done(key)
        first = [task for _, task in ids[:2]]
        assert ids == [(epoch, task) for epoch in range(3) for task in first]
