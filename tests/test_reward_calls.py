"""What rewards and workflows may return, and sums of rewards."""

from __future__ import annotations

import asyncio
import functools
import math
import pickle
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task, Turn
from lightning_rft.pickling import dumps
from lightning_rft.reward_calls import Answered, RewardFunction, RewardSum, check_reward, total
from lightning_rft.rewards import check_answers, exact_match, last_number
from lightning_rft.scores import Answer, Sample, Score, as_score

TASK = Task("question", answer="4", id="t7")
GROUP = [Answered(text, TASK) for text in ("4", "44", "")]
TURN = Turn((1,), (2, 3), (-0.5, -0.5), (0, 0), "stop")


def right(completion: str, task: Task) -> float:
    return float(completion == task.answer)


def length(completion: str, task: Task) -> int:
    return len(completion)


def of_all(completions: list[str], tasks: list[Task]) -> list[float]:
    return [len(completion) / max(map(len, completions)) for completion in completions]


async def later(completion: str, task: Task) -> float:
    await asyncio.sleep(0)
    return 10.0 * len(completion)


# What a reward returns


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, Score(1.0)),
        (np.float32(0.5), Score(0.5)),
        ({"a": 1, "b": np.float64(0.5)}, Score(1.5, {"a": 1.0, "b": 0.5})),
        (MappingProxyType({"a": -1}), Score(-1.0, {"a": -1.0})),
        (Score(3), Score(3.0)),
        (Score(torch.tensor(0.0), {"a": 1}), Score(0.0, {"a": 1.0})),
    ],
)
def test_numbers_parts_and_scores(value: object, score: Score) -> None:
    found = as_score(value, "t7")
    assert found == score and type(found.reward) is float and {type(part) for part in found.parts.values()} <= {float}
    assert pickle.loads(dumps(found)) == found


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "reward returned no part for task 't7': return a number, or at least one part"),
        ({"a": float("nan")}, "part 'a' of the reward returned nan .* for task 't7'"),
        ({"a": 1.0, "b": None}, "part 'b' of the reward returned None .* for task 't7'"),
        ({"a": 3e38, "b": 3e38}, "reward returned 6e"),
        ({"a/b": 1.0}, "a part of the reward is named 'a/b'"),
        ({"std": 1.0}, "a part of the reward is named 'std'"),
        ({3: 1.0}, "a part of the reward is named 3"),
        (Score(float("inf")), "reward returned inf"),
        (Score(1.0, {"a": float("nan")}), "part 'a' of the reward returned nan"),
        (Score(1.0, None), "reward returned Score"),  # type: ignore[arg-type]
        ((1.0, {"a": 1.0}), "reward returned"),
    ],
)
def test_what_is_no_score(value: object, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        as_score(value, "t7")


# What a workflow returns


def test_an_answer_says_what_it_earned_or_leaves_that_to_the_reward() -> None:
    assert Answer("a").score is None
    assert Answer("a", metrics={"calls": 3}).score is None
    assert Answer("a", reward=True).score == Score(1.0)
    assert Answer("a", rewards={"won": 1, "speed": 0.5}).score == Score(1.5, {"won": 1.0, "speed": 0.5})
    assert Answer("a", reward=0, rewards={"won": 1}).score == Score(0.0, {"won": 1.0})
    assert type(Answer("a", metrics={"calls": np.int64(3)}).metrics["calls"]) is float


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"text": None}, r"Answer\(text=...\) is a NoneType"),
        ({"reward": float("nan")}, r"Answer\(reward=...\) is nan \(float\): give a finite number"),
        ({"reward": "1"}, r"Answer\(reward=...\) is '1'"),
        ({"rewards": 1.0}, r"Answer\(rewards=...\) is a float: give numbers by name"),
        ({"rewards": {"won": math.inf}}, r"Answer\(rewards=...\)\['won'\] is inf"),
        ({"rewards": {"a b": 1.0}}, "a part of the reward is named 'a b'"),
        ({"metrics": [1.0]}, r"Answer\(metrics=...\) is a list"),
        ({"metrics": {"calls": None}}, r"Answer\(metrics=...\)\['calls'\] is None"),
        ({"metrics": {"a/b": 1.0}}, "a metric is named 'a/b'"),
    ],
)
def test_an_answer_of_wrong_types_says_so_where_it_is_made(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Answer(**{"text": "a"} | arguments)


# What a batched reward returns


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_a_reward_of_all_samples_returns_one_for_each(kind: Callable[[list[float]], Any]) -> None:
    reward = RewardFunction.of(lambda completions, tasks: kind([0.5, 1.0, 2.0]))
    assert reward.batched and reward.scores(GROUP) == [Score(0.5), Score(1.0), Score(2.0)]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0, 2.0], "reward returned 2 rewards for 3 completions of task 't7': return a list with the reward of each"),
        ([1.0] * 4, "4 rewards for 3"),
        ([], "0 rewards for 3"),
        (1.0, "a float for 3"),
        (None, "a NoneType for 3"),
        (np.array(1.0), "a ndarray for 3"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "a dict for 3"),
        ("abc", "reward returned 'a'"),
        ([1.0, float("nan"), 2.0], "reward returned nan .* for task 't7'"),
        ([1.0, [1.0], 2.0], "reward returned .* for task 't7': return a finite float"),
        (np.zeros((3, 1)), "reward returned"),
    ],
)
def test_a_reward_of_all_samples_that_returns_anything_else(returned: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        RewardFunction.of(lambda completions, tasks: returned).scores(GROUP)


def test_how_a_reward_is_called_is_seen_from_its_parameters() -> None:
    class Judge:
        async def __call__(self, completions: list[str], tasks: list[Task], samples: list[Sample]) -> list[float]:
            return [0.0] * len(completions)

    def seen(reward: Callable[..., Any]) -> tuple[bool, bool, bool]:
        check_reward(reward)
        kind = RewardFunction.of(reward)
        return kind.is_async, kind.batched, kind.wants_sample

    assert seen(right) == (False, False, False)
    assert seen(later) == (True, False, False)
    assert seen(of_all) == (False, True, False)
    assert seen(lambda completions, tasks, *, samples: []) == (False, True, True)
    assert seen(lambda completion, task, sample: 0.0) == (False, False, True)
    assert seen(lambda completions, tasks, sample=None: []) == (False, True, False)
    assert seen(Judge()) == (True, True, True)
    assert seen(functools.partial(later)) == (True, False, False)
    assert seen(min) == (False, False, False)


def test_batched_rewards_that_cannot_be_called_are_refused() -> None:
    for reward in (lambda completions, tasks, other: [], lambda completions: []):
        with pytest.raises(ConfigurationError, match=r"`reward\(completions, tasks\) -> list\[float\]`"):
            check_reward(reward)


# Sums


def test_a_sum_adds_its_parts_and_names_them() -> None:
    reward = RewardSum({"right": right, "length": length, "only.logged": length}, {"length": -0.5, "only.logged": 0})
    check_reward(reward)
    assert reward("4", TASK) == Score(0.5, {"right": 1.0, "length": 1.0, "only.logged": 1.0})
    assert reward("44", TASK) == Score(-1.0, {"right": 0.0, "length": 2.0, "only.logged": 2.0})


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=5))
def test_a_sum_is_weighted_and_its_parts_are_not(parts: Sequence[tuple[float, float]]) -> None:
    functions = {f"p{index}": (lambda c, t, value=value: value) for index, (value, _) in enumerate(parts)}
    weights = {f"p{index}": weight for index, (_, weight) in enumerate(parts)}
    score = RewardSum(functions, weights)("", TASK)
    assert isinstance(score, Score)
    assert score.reward == pytest.approx(sum(value * weight for value, weight in parts))
    assert list(score.parts.values()) == [value for value, _ in parts]


def test_parts_of_a_part_are_named_after_it() -> None:
    form = RewardSum({"short": length, "right": right})
    reward = RewardSum({"form": form, "tags": lambda completion, task: {"open": 1, "closed": 0}}, {"form": 2})
    parts = {"form": 2.0, "form.short": 1.0, "form.right": 1.0, "tags": 1.0, "tags.open": 1.0, "tags.closed": 0.0}
    assert reward("4", TASK) == Score(5.0, parts)


def test_parts_are_called_each_in_its_way() -> None:
    def counts(completion: str, task: Task, sample: Sample) -> float:
        return float(sum(turn.num_tokens for turn in sample.turns))

    reward = RewardSum({"right": right, "counts": counts, "of_all": of_all})
    assert (reward.is_async, reward.batched, reward.wants_sample) == (False, True, True)
    sample = Sample((TURN,), ("4",))
    group = [Answered(text, TASK, sample) for text in ("4", "44")]
    assert reward.scores(group) == [
        Score(3.5, {"right": 1.0, "counts": 2.0, "of_all": 0.5}),
        Score(3.0, {"right": 0.0, "counts": 2.0, "of_all": 1.0}),
    ]
    assert reward("4", TASK, sample) == Score(4.0, {"right": 1.0, "counts": 2.0, "of_all": 1.0})  # a group of one


def test_async_parts_run_at_the_same_time_and_make_the_sum_async() -> None:
    async def run() -> None:
        both = asyncio.Barrier(2 * len(GROUP))

        async def judge(completion: str, task: Task) -> float:
            await asyncio.wait_for(both.wait(), 20)  # for each part of each sample
            return 1.0

        reward = RewardSum({"one": judge, "right": right, "other": judge, "batched": batched}, {"other": 2})
        assert reward.is_async and reward.batched
        scores = await reward.awaited_scores(GROUP)
        assert [score.reward for score in scores] == [1 + 1 + 2 + 0, 3 + 1, 3 + 2]
        assert list(scores[0].parts) == ["one", "right", "other", "batched"]

    async def batched(completions: list[str], tasks: list[Task]) -> list[int]:
        return [*range(len(completions))]

    asyncio.run(run())
    alone: Any = RewardSum({"later": later, "right": right})("4", TASK)
    assert asyncio.run(alone) == Score(11.0, {"later": 10.0, "right": 1.0})


def test_a_part_that_raises_ends_the_others() -> None:
    cancelled = []

    async def waits(completion: str, task: Task) -> float:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.append(completion)
        return 1.0

    async def raises(completion: str, task: Task) -> float:
        await asyncio.sleep(0)
        raise LookupError(completion)

    async def run() -> None:
        with pytest.raises(LookupError, match="4"):
            await RewardSum({"waits": waits, "raises": raises}).awaited_scores(GROUP)
        for _ in range(5):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert cancelled == ["4", "44", ""]


def test_a_part_that_returns_no_number_is_named() -> None:
    reward = RewardSum({"right": right, "bad": lambda completion, task: math.nan})
    with pytest.raises(ConfigurationError, match="part 'bad' of the reward returned nan"):
        reward("4", TASK)


def test_the_halves_of_a_sum_are_the_sum() -> None:
    reward = RewardSum({"right": right, "later": later, "length": length}, {"later": 0.5, "length": 2})
    plain, awaited = reward.half(is_async=False), reward.half(is_async=True)
    assert plain is not None and awaited is not None and not plain.is_async and awaited.is_async
    whole = asyncio.run(reward.awaited_scores(GROUP))
    assert list(map(total, plain.scores(GROUP), asyncio.run(awaited.awaited_scores(GROUP)))) == whole
    assert RewardSum({"right": right}).half(is_async=True) is None
    assert RewardSum({"later": later}).half(is_async=False) is None


def test_a_sum_travels_to_another_process() -> None:
    bonus = 0.25
    reward = RewardSum({"right": right, "mine": lambda completion, task: bonus}, {"mine": 2})
    again = pickle.loads(dumps(reward))
    assert again("4", TASK) == reward("4", TASK) == Score(1.5, {"right": 1.0, "mine": 0.25})


@pytest.mark.parametrize(
    ("parts", "weights", "said"),
    [
        ({}, None, r"RewardSum\(parts=\{\}\) has nothing to add"),
        ({"a/b": right}, None, "a part of the reward is named 'a/b'"),
        ({"std": right}, None, "a part of the reward is named 'std'"),
        ({"a": right}, {"b": 1.0}, r"RewardSum\(weights=...\) has 'b', which is no part: a"),
        ({"a": right}, {"a": math.nan}, r"RewardSum\(weights=...\)\['a'\] is nan .*: give a finite number"),
        ({"a": right}, {"a": "1"}, r"RewardSum\(weights=...\)\['a'\] is '1'"),
        ({"a": 1.0}, None, "reward is 1.0, which cannot be called"),
        ({"a": lambda completion: 1.0}, None, r"has the signature \(completion\)"),
    ],
)
def test_a_sum_that_cannot_work_is_refused_when_it_is_made(parts: Any, weights: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        RewardSum(parts, weights)


def test_answers_are_checked_for_the_parts_of_a_sum_too() -> None:
    tasks = [Task("question", answer="yes", id="t8")]
    check_answers(RewardSum({"match": exact_match, "mine": right}), tasks)
    with pytest.raises(ConfigurationError, match="last_number finds no number in the answer 'yes' of task 't8'"):
        check_answers(RewardSum({"match": exact_match, "number": last_number}), tasks)
