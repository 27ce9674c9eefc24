"""An explorer within this process: what samples earn, from their workflow, from their reward, alone or as a group."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.errors import ConfigurationError, ContextFull
from lightning_rft.experience import GroupKey, Task
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.messages import Cancel, Explore, Explored
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.reward_calls import RewardSum
from lightning_rft.scores import Answer, Sample, Score
from lightning_rft.settings import Timeouts, Tolerance
from tests.explorer.test_worker import GROUP, SAMPLING, answers, fails_with

FOUR = replace(GROUP, seeds=(1, 2, 3, 4))
ONCE = Tolerance(retries=0)


async def never(completion: str, task: Task) -> float:
    raise AssertionError("the workflow knows the reward")


def answering(**earned: Any) -> Any:
    async def workflow(task: Task, policy: Policy) -> Answer:
        return Answer(await policy(task.prompt), **earned)

    return workflow


# From the workflow


def test_a_workflow_that_knows_the_reward(tiny_model_path: Path) -> None:
    workflow = answering(reward=2, rewards={"won": 1.0}, metrics={"calls": 3})
    for reward in (never, None):
        (answer,) = answers(tiny_model_path, GROUP, workflow=workflow, reward=reward)
        assert isinstance(answer, Explored) and len(answer.experiences) == 2
        for one in answer.experiences:
            assert (one.reward, one.rewards, one.metrics) == (2.0, {"won": 1.0}, {"calls": 3.0})
            assert one.text and type(one.text) is str


def test_parts_of_a_workflow_are_added_and_metrics_alone_are_no_reward(tiny_model_path: Path) -> None:
    (answer,) = answers(tiny_model_path, GROUP, workflow=answering(rewards={"a": 1.0, "b": -3.0}), reward=never)
    assert [one.reward for one in answer.experiences] == [-2.0, -2.0]

    async def reward(completion: str, task: Task) -> dict[str, float]:
        return {"right": 1.0, "form": 0.5}

    (answer,) = answers(tiny_model_path, GROUP, workflow=answering(metrics={"calls": 3}), reward=reward)
    for one in answer.experiences:
        assert (one.reward, one.rewards, one.metrics) == (1.5, {"right": 1.0, "form": 0.5}, {"calls": 3.0})


def test_an_answer_without_a_reward_where_there_is_none_to_ask(tiny_model_path: Path) -> None:
    error = fails_with(tiny_model_path, reward=None)
    assert isinstance(error, ConfigurationError)
    assert "'t' without a reward" in str(error)
    assert "Answer(text, reward=...), or set RFTDataModule(reward=...)" in str(error)


@pytest.mark.parametrize("earned", [{"reward": float("nan")}, {"rewards": {"a/b": 1.0}}, {"metrics": [1.0]}])
def test_an_answer_of_wrong_types_is_not_tried_again(tiny_model_path: Path, earned: dict[str, Any]) -> None:
    calls: list[Task] = []

    async def workflow(task: Task, policy: Policy) -> Answer:
        calls.append(task)
        return Answer(await policy(task.prompt), **earned)

    assert isinstance(fails_with(tiny_model_path, workflow=workflow, reward=None), ConfigurationError)
    assert len(calls) == len(GROUP.seeds)


def test_an_answer_whose_text_is_none(tiny_model_path: Path) -> None:
    async def workflow(task: Task, policy: Policy) -> Answer:
        await policy(task.prompt)
        return Answer("a\ud800", reward=1.0)

    assert "a lone surrogate at character 1" in str(fails_with(tiny_model_path, workflow=workflow, reward=None))


# From parts


def test_parts_reach_the_experience(tiny_model_path: Path) -> None:
    async def judged(completion: str, task: Task) -> Score:
        return Score(0.5, {"style": 0.25})

    reward = RewardSum({"judge": judged, "length": lambda completion, task: len(completion)}, {"length": 0})
    (answer,) = answers(tiny_model_path, GROUP, reward=reward)
    for one in answer.experiences:
        parts = {"judge": 0.5, "judge.style": 0.25, "length": float(len(one.text))}
        assert (one.reward, one.rewards) == (0.5, parts)


def test_a_part_with_a_name_that_loggers_refuse(tiny_model_path: Path) -> None:
    error = fails_with(tiny_model_path, reward=lambda completion, task: {"a/b": 1.0})
    assert isinstance(error, ConfigurationError) and "a part of the reward is named 'a/b'" in str(error)


# As a group


class Judge:
    """Rewards each sample with its place among the completions."""

    def __init__(self, fails: int = 0) -> None:
        self.calls: list[list[str]] = []
        self.fails = fails

    async def __call__(self, completions: list[str], tasks: list[Task]) -> list[float]:
        self.calls.append(completions)
        self.fails -= 1
        if self.fails >= 0:
            raise LookupError("judge")
        return [*map(float, range(len(completions)))]


def test_a_reward_of_all_samples_is_called_once_for_a_group(tiny_model_path: Path) -> None:
    other = replace(FOUR, key=GroupKey(-1, 7), seeds=(5, 6))  # of a validation
    judge = Judge()
    found = {answer.key: answer for answer in answers(tiny_model_path, FOUR, other, reward=judge, replies=2)}
    assert sorted(map(len, judge.calls)) == [2, 4]
    for key, count in ((FOUR.key, 4), (other.key, 2)):
        experiences = found[key].experiences
        assert [one.reward for one in experiences] == [*map(float, range(count))]
        assert [one.text for one in experiences] in judge.calls


class Trips:
    """A workflow that raises in some samples, as often as they say."""

    def __init__(self, *failures: int) -> None:
        self.failures = [*failures]
        self.tries = 0

    async def __call__(self, task: Task, policy: Policy) -> str:
        self.tries += 1
        text = await policy(task.prompt)
        index = int(policy._name.split("/")[-2])
        self.failures[index] -= 1
        if self.failures[index] >= 0:
            raise LookupError("workflow")
        return text


def test_a_sample_that_is_tried_again_alone_is_waited_for(tiny_model_path: Path) -> None:
    judge, workflow = Judge(), Trips(0, 2, 0, 1)
    (answer,) = answers(tiny_model_path, FOUR, reward=judge, workflow=workflow)
    assert list(map(len, judge.calls)) == [4] and workflow.tries == 4 + 3
    assert [one.reward for one in answer.experiences] == [0.0, 1.0, 2.0, 3.0]
    assert answer.retried == 3 and answer.failures == ()


def test_the_others_are_scored_without_a_sample_that_failed_for_good(tiny_model_path: Path) -> None:
    judge = Judge()
    (answer,) = answers(tiny_model_path, FOUR, reward=judge, workflow=Trips(0, 9, 0, 0))
    assert list(map(len, judge.calls)) == [3] and len(answer.failures) == 1
    assert [(one.sample, one.reward) for one in answer.experiences] == [(0, 0.0), (2, 1.0), (3, 2.0)]


def test_a_sample_that_knows_its_reward_is_not_scored_with_the_others(tiny_model_path: Path) -> None:
    async def workflow(task: Task, policy: Policy) -> str | Answer:
        text = await policy(task.prompt)
        return Answer(text, reward=9.0) if policy._name.split("/")[-2] == "1" else text

    judge = Judge()
    (answer,) = answers(tiny_model_path, FOUR, reward=judge, workflow=workflow)
    assert list(map(len, judge.calls)) == [3]
    assert [one.reward for one in answer.experiences] == [0.0, 9.0, 1.0, 2.0]


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_call_that_fails_is_the_failure_of_all_that_were_scored(tiny_model_path: Path, fails: int) -> None:
    judge = Judge(fails)
    (answer,) = answers(tiny_model_path, FOUR, reward=judge, tolerance=Tolerance(retries=2))
    assert list(map(len, judge.calls)) == [4] * min(3, fails + 1)
    assert answer.retried == 4 * min(2, fails)
    assert len(answer.experiences) == (0 if fails == 3 else 4)
    assert {type(failure.unpack("here")) for failure in answer.failures} == ({LookupError} if fails == 3 else set())


@pytest.mark.parametrize("returned", [[1.0], [1.0] * 3, [1.0, float("nan")], None])
def test_a_reward_of_all_samples_that_returns_nonsense_is_not_asked_again(tiny_model_path: Path, returned: Any) -> None:
    calls: list[int] = []

    async def reward(completions: list[str], tasks: list[Task]) -> Any:
        calls.append(len(completions))
        return returned

    assert isinstance(fails_with(tiny_model_path, reward=reward), ConfigurationError)
    assert calls == [2]


def test_a_reward_of_all_samples_that_hangs_ends_in_time(tiny_model_path: Path) -> None:
    async def reward(completions: list[str], tasks: list[Task]) -> list[float]:
        await asyncio.sleep(3600)
        return []

    error = fails_with(tiny_model_path, reward=reward, tolerance=ONCE, timeouts=Timeouts(reward_s=0.1, workflow_s=30.0))
    assert "the reward of task 't' took longer than Timeouts(reward_s=0.1)" in str(error)


def test_a_sample_that_hangs_holds_the_others_up_only_until_its_time_is_over(tiny_model_path: Path) -> None:
    async def workflow(task: Task, policy: Policy) -> str:
        text = await policy(task.prompt)
        if policy._name.split("/")[-2] == "0":
            await asyncio.sleep(3600)
        return text

    timeouts = Timeouts(reward_s=30.0, workflow_s=0.5)
    judge = Judge()
    (answer,) = answers(tiny_model_path, FOUR, reward=judge, workflow=workflow, tolerance=ONCE, timeouts=timeouts)
    assert list(map(len, judge.calls)) == [3] and len(answer.failures) == 1


@pytest.mark.parametrize("during", ["sampling", "scoring"])
def test_a_cancelled_group_is_forgotten_and_others_are_scored(tiny_model_path: Path, during: str) -> None:
    called = Counter[str]()
    reached = asyncio.Event()

    async def reward(completions: list[str], tasks: list[Task]) -> list[float]:
        called[tasks[0].id] += 1
        if tasks[0].id == "t":
            reached.set()
            await asyncio.sleep(3600)
        return [1.0] * len(completions)

    async def workflow(task: Task, policy: Policy) -> str:
        text = await policy(task.prompt)
        if task.id == "t" and during == "sampling" and policy._name.split("/")[-2] == "1":
            reached.set()
            await asyncio.sleep(3600)  # while the others wait for it
        return text

    other = Explore(run=6, key=GroupKey(0, 0), attempt=1, task=Task("2", id="u"), seeds=(1, 2), sampling=SAMPLING)
    messages = (FOUR, reached, Cancel(run=5), other)
    (answer,) = answers(tiny_model_path, *messages, reward=reward, workflow=workflow, engine=FakeEngine(mean_tokens=1))
    assert answer.run == 6 and [one.reward for one in answer.experiences] == [1.0, 1.0]
    assert called == Counter({"u": 1} | ({"t": 1} if during == "scoring" else {}))


# What an agent did


async def outgrows(task: Task, policy: Policy) -> str:
    text = str(task.prompt)
    while True:
        text += await policy(text)
        text += "x" * 10


async def outgrows_in_a_task_group(task: Task, policy: Policy) -> str:
    async with asyncio.TaskGroup() as group:
        group.create_task(outgrows(task, policy))
    return "never"


async def outgrows_and_says_so(task: Task, policy: Policy) -> str:
    try:
        return await outgrows(task, policy)
    except ContextFull as error:
        raise RuntimeError("my agent's own") from error


async def outgrows_as_an_openai_client(task: Task, policy: Policy) -> str:
    client = policy.endpoint().openai()
    text = str(task.prompt)
    while True:
        done = await client.completions.create(model="m", prompt=text)
        text += done.choices[0].text + "x" * 10


@pytest.mark.parametrize(
    "workflow", [outgrows, outgrows_in_a_task_group, outgrows_and_says_so, outgrows_as_an_openai_client]
)
def test_a_conversation_that_fills_the_context_ends_with_its_last_answer(tiny_model_path: Path, workflow: Any) -> None:
    if workflow is outgrows_as_an_openai_client:
        pytest.importorskip("openai")
    (answer,) = answers(tiny_model_path, GROUP, workflow=workflow, reward=lambda completion, task: len(completion))
    assert len(answer.experiences) == 2 and answer.failures == ()
    for one in answer.experiences:
        last = one.turns[-1]
        assert len(one.turns) > 1 and len(last.prompt_ids) + last.num_tokens + 10 + 8 > 50
        assert one.reward == len(one.text) > 0 and one.num_tokens == sum(turn.num_tokens for turn in one.turns)


def test_a_first_prompt_that_does_not_fit_is_a_failure(tiny_model_path: Path) -> None:
    asked: list[int] = []

    async def workflow(task: Task, policy: Policy) -> str:
        asked.append(policy.max_model_len)
        return await policy("x" * 50)

    assert isinstance(fails_with(tiny_model_path, workflow=workflow), ContextFull)
    assert asked == [50, 50]  # it would not fit the next time either


def test_an_error_on_the_way_out_of_a_full_context_is_an_error(tiny_model_path: Path) -> None:
    async def workflow(task: Task, policy: Policy) -> str:
        try:
            return await outgrows(task, policy)
        except ContextFull:
            raise KeyError("summary") from None

    assert isinstance(fails_with(tiny_model_path, workflow=workflow, tolerance=ONCE), KeyError)


def test_a_workflow_may_go_on_when_the_context_is_full(tiny_model_path: Path) -> None:
    async def workflow(task: Task, policy: Policy) -> Answer:
        try:
            return Answer(await outgrows(task, policy))
        except ContextFull:
            return Answer(await policy("summary"), reward=float(len(policy.turns)))

    (answer,) = answers(tiny_model_path, GROUP, workflow=workflow, reward=None)
    assert [one.reward for one in answer.experiences] == [float(len(one.turns)) for one in answer.experiences]


def test_a_reward_sees_the_conversation(tiny_model_path: Path) -> None:
    seen: list[Sample] = []

    async def workflow(task: Task, policy: Policy) -> str:
        messages = [{"role": "user", "content": "1"}]
        messages += [(await policy(messages)).message, {"role": "user", "content": "2"}]
        return await policy(messages)

    async def reward(completion: str, task: Task, sample: Sample) -> float:
        seen.append(sample)
        assert sample.messages is not None and sample.messages[-1]["content"] == completion
        return float(len(sample.messages))

    (answer,) = answers(tiny_model_path, GROUP, workflow=workflow, reward=reward)
    assert [(one.reward, one.metrics) for one in answer.experiences] == [(4.0, {"drift": 0.0})] * 2
    for sample in seen:
        assert [turn.parent for turn in sample.turns] == [None, 0] and len(sample.raw_texts) == 2
    (answer,) = answers(tiny_model_path, GROUP, reward=lambda completion, task, sample: sample.messages is None)
    assert [(one.reward, one.metrics) for one in answer.experiences] == [(1.0, {})] * 2


def test_rewards_of_turns_are_kept_with_them(tiny_model_path: Path) -> None:
    async def workflow(task: Task, policy: Policy) -> str:
        first = await policy("1")
        first.reward = True
        return await policy("2")

    (answer,) = answers(tiny_model_path, GROUP, workflow=workflow)
    assert [[turn.reward for turn in one.turns] for one in answer.experiences] == [[1.0, None]] * 2
    assert [one.metrics["turn_rewards"] for one in answer.experiences] == [1.0, 1.0]
    assert [one.reward for one in answer.experiences] == [2.0, 2.0]


@pytest.mark.parametrize("value", [float("nan"), "1", 1e39])
def test_a_reward_of_a_turn_that_is_no_number(tiny_model_path: Path, value: Any) -> None:
    async def workflow(task: Task, policy: Policy) -> str:
        reply = await policy("1")
        reply.reward = value
        return reply

    error = fails_with(tiny_model_path, workflow=workflow)
    assert isinstance(error, ConfigurationError) and "set the reward of a turn of task 't' to" in str(error)
