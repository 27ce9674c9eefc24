"""An explorer within this process: how groups are run, tried again, given up and forgotten."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.channel import Channel
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import GroupKey, Task
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.messages import Advanced, Cancel, Ended, Explore, Explored, Sampled, Several, Started
from lightning_rft.explorer.spec import ExplorerSpec
from lightning_rft.explorer.worker.explorer import Explorer
from lightning_rft.explorer.worker.users_code import note_programs
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.explorer.workflows.single_turn import SingleTurn
from lightning_rft.model_folder import Pretrained
from lightning_rft.settings import Sampling, Timeouts, Tolerance

SAMPLING = Sampling(max_new_tokens=8, temperature=1.0, seed=0)
GROUP = Explore(run=5, key=GroupKey(3, 1), attempt=1, task=Task("1 + 1 =", id="t"), seeds=(7, 8), sampling=SAMPLING)


@contextmanager
def line() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    channels = Channel(ours.detach()), Channel(theirs.detach())
    try:
        yield channels
    finally:
        for channel in channels:
            channel.close()


def heard(channel: Channel, ended: list[Ended]) -> Any:
    """The next message that is more than a sign of life or of samples that have ended; the latter are kept."""
    while isinstance(message := channel.receive(30), Advanced | Ended | Sampled):
        if isinstance(message, Ended):
            ended.append(message)
    return message


def answers(
    model: Path, *messages: Any, replies: int = 1, ended: list[Ended] | None = None, **changes: Any
) -> list[Any]:
    """What an explorer sends after its start when it is sent these messages, each event once it has happened."""
    told: list[Ended] = [] if ended is None else ended
    settings: dict[str, Any] = {
        "engine": FakeEngine(),
        "model": Pretrained(str(model)),
        "workflow": SingleTurn(),
        "reward": lambda completion, task: 1.0,
        "max_model_len": 50,
        "seed": 0,
        "tolerance": Tolerance(retries=2),
        "timeouts": Timeouts(reward_s=30.0, workflow_s=30.0),
    }

    engine = (settings | changes)["engine"]

    async def run() -> list[Any]:
        with line() as (ours, theirs):
            explorer = Explorer(theirs, ExplorerSpec(**settings | changes))
            inbox: asyncio.Queue[Any] = asyncio.Queue()
            serving = asyncio.ensure_future(explorer.serve(inbox))
            try:
                assert await asyncio.to_thread(ours.receive, 30) == Started("float32", 1, False, engine.max_num_seqs)
                for message in messages:
                    if isinstance(message, asyncio.Event):
                        await asyncio.wait_for(message.wait(), 30)
                    else:
                        inbox.put_nowait(message)
                received = [await asyncio.to_thread(heard, ours, told) for _ in range(replies)]
                if not replies:  # it is to end by itself
                    await asyncio.wait_for(serving, 30)
                inbox.put_nowait(None)
                await serving
                with pytest.raises(TimeoutError):
                    ours.receive(0)  # and nothing else
                return received
            finally:
                explorer.stop()

    return asyncio.run(run())


def fails_with(model: Path, *messages: Any, **changes: Any) -> BaseException:
    (answer,) = answers(model, *messages or (GROUP,), **changes)
    assert isinstance(answer, Explored)
    assert (answer.run, answer.key, answer.experiences) == (GROUP.run, GROUP.key, ())
    assert len(answer.failures) == len(GROUP.seeds)
    return answer.failures[0].unpack("here")


def test_a_group(tiny_model_path: Path) -> None:
    (answer,) = answers(tiny_model_path, GROUP, reward=lambda completion, task: float(len(task.prompt)))
    assert isinstance(answer, Explored)
    assert (answer.run, answer.key) == (5, GroupKey(3, 1))
    assert [experience.sample for experience in answer.experiences] == [0, 1]
    assert [experience.reward for experience in answer.experiences] == [7.0, 7.0]
    first, second = (experience.turns[0].token_ids.tolist() for experience in answer.experiences)
    assert first != second
    (again,) = answers(tiny_model_path, GROUP)
    assert [experience.turns for experience in again.experiences] == [e.turns for e in answer.experiences]


@pytest.mark.parametrize("retries", [0, 2])
def test_a_sample_is_tried_again_as_often_as_asked(tiny_model_path: Path, retries: int) -> None:
    tries = Counter[str]()

    async def reward(completion: str, task: Task) -> float:
        tries[completion] += 1
        raise LookupError("never")

    assert isinstance(fails_with(tiny_model_path, reward=reward, tolerance=Tolerance(retries=retries)), LookupError)
    assert max(tries.values()) == retries + 1


def test_a_retry_that_succeeds_is_a_success(tiny_model_path: Path) -> None:
    tries = Counter[str]()

    async def reward(completion: str, task: Task) -> float:
        tries[completion] += 1
        if tries[completion] < 3:
            raise LookupError("not yet")
        return 1.0

    (answer,) = answers(tiny_model_path, GROUP, reward=reward)
    assert isinstance(answer, Explored)
    assert [len(experience.turns) for experience in answer.experiences] == [1, 1]  # none of a failed try


def count(ended: Sequence[Ended]) -> Counter[tuple[int, GroupKey, int]]:
    """How many samples have ended, by run, group and attempt."""
    counts = Counter[tuple[int, GroupKey, int]]()
    for message in ended:
        for (key, attempt), number in message.samples.items():
            counts[message.run, key, attempt] += number
    return counts


@pytest.mark.parametrize("failing", [0, 2, 9])
def test_every_sample_ends_once_and_before_its_group(tiny_model_path: Path, failing: int) -> None:
    tries = Counter[str]()

    async def reward(completion: str, task: Task) -> float:
        tries[completion] += 1
        if tries[completion] <= failing:  # even if it is tried again, or fails for good
            raise LookupError("not yet")
        return 1.0

    other = Explore(run=5, key=GroupKey(3, 2), attempt=4, task=Task("2", id="u"), seeds=(1, 2, 3), sampling=SAMPLING)
    ended: list[Ended] = []
    answers(tiny_model_path, Several((GROUP, other)), reward=reward, replies=2, ended=ended)
    assert count(ended) == {(5, GroupKey(3, 1), 1): 2, (5, GroupKey(3, 2), 4): 3}


def test_samples_that_end_in_the_same_step_of_the_engine_are_told_of_together(tiny_model_path: Path) -> None:
    other = Explore(run=5, key=GroupKey(3, 2), attempt=1, task=Task("2", id="u"), seeds=(1, 2, 3), sampling=SAMPLING)
    ended: list[Ended] = []
    alike = FakeEngine(mean_tokens=1)
    answers(tiny_model_path, Several((GROUP, other)), engine=alike, replies=2, ended=ended)
    assert [message.samples for message in ended] == [{(GroupKey(3, 1), 1): 2, (GroupKey(3, 2), 1): 3}]


def test_samples_end_before_their_rewards_but_for_a_backlog(tiny_model_path: Path) -> None:
    async def reward(completion: str, task: Task) -> float:
        await asyncio.sleep(0.3)
        return 1.0

    group = Explore(run=5, key=GroupKey(3, 1), attempt=1, task=Task("2", id="u"), seeds=(1, 2, 3, 4), sampling=SAMPLING)
    ended: list[Ended] = []
    alike = FakeEngine(mean_tokens=1, max_num_seqs=3)
    answers(tiny_model_path, group, engine=alike, reward=reward, ended=ended)
    first, last = (message.samples[GroupKey(3, 1), 1] for message in ended)
    assert (first, last) == (3, 1)  # the fourth would be one reward more than there are slots


def _reward(value: Any, calls: list[str]) -> Callable[..., Any]:
    async def reward(completion: str, task: Task) -> Any:
        calls.append(completion)
        return value

    return reward


@pytest.mark.parametrize("value", [float("nan"), None, "1.0"])
def test_a_reward_that_is_no_number_is_not_tried_again(tiny_model_path: Path, value: Any) -> None:
    calls: list[str] = []
    error = fails_with(tiny_model_path, reward=_reward(value, calls))
    assert isinstance(error, ConfigurationError)
    assert "for task 't': return a finite float" in str(error)
    assert max(Counter(calls).values()) == 1


def test_a_workflow_that_never_calls_the_policy(tiny_model_path: Path) -> None:
    async def workflow(task: Task, policy: Policy) -> str:
        return "nothing"

    error = fails_with(tiny_model_path, workflow=workflow)
    assert isinstance(error, ConfigurationError)
    assert "task 't' without calling the policy" in str(error)


def test_an_error_in_a_step_of_the_engine(tiny_model_path: Path) -> None:
    class Broken(FakeEngine):
        def step(self) -> Any:
            raise OverflowError("too many")

    with pytest.raises(OverflowError, match="too many"):  # the explorer's own end, not a group's
        answers(tiny_model_path, GROUP, engine=Broken(), replies=0)


def test_a_cancelled_run_is_forgotten_and_others_go_on(tiny_model_path: Path) -> None:
    other = Explore(run=6, key=GroupKey(0, 0), attempt=1, task=Task("2", id="u"), seeds=(1,), sampling=SAMPLING)
    endless = FakeEngine(mean_tokens=10_000, tokens_per_second=50.0)
    ended: list[Ended] = []
    (answer,) = answers(tiny_model_path, GROUP, Cancel(run=5), other, engine=endless, ended=ended)
    assert count(ended) == {(6, GroupKey(0, 0), 1): 1}
    assert isinstance(answer, Explored)
    assert answer.run == 6


def test_groups_that_arrive_together_begin_with_the_same_step_of_the_engine(tiny_model_path: Path) -> None:
    class Watched(FakeEngine):
        def add(self, request: Any) -> None:
            calls.append("add")
            super().add(request)

        def step(self) -> Any:
            calls.append("step")
            return super().step()

    async def workflow(task: Task, policy: Policy) -> str:
        time.sleep(0.01)  # long enough for a step, were the engine given what came before
        return await policy(task.prompt)

    calls: list[str] = []
    other = Explore(run=5, key=GroupKey(3, 2), attempt=1, task=Task("2", id="u"), seeds=(1, 2, 3), sampling=SAMPLING)
    answers(tiny_model_path, Several((GROUP, other)), engine=Watched(), workflow=workflow, replies=2)
    assert calls[:6] == ["add"] * 5 + ["step"]


def test_messages_that_arrive_together_are_handled_in_order(tiny_model_path: Path) -> None:
    other = Explore(run=6, key=GroupKey(0, 0), attempt=1, task=Task("2", id="u"), seeds=(1,), sampling=SAMPLING)
    (answer,) = answers(tiny_model_path, Several((GROUP, Cancel(run=5), other)))
    assert answer.run == 6


# What users hand in


def one_of(model: Path, bad: str, *, reward: Any = None, workflow: Any = None) -> Explored:
    """A group of two, where the first sample goes wrong as ``bad`` says; the second must be as ever."""
    settings: dict[str, Any] = {"tolerance": Tolerance(retries=0)}
    if workflow is not None:
        settings["workflow"] = workflow
    if reward is not None:
        settings["reward"] = reward
    (answer,) = answers(model, GROUP, **settings)
    assert isinstance(answer, Explored)
    assert len(answer.experiences) == len(answer.failures) == 1, bad
    return answer


class Once:
    """A workflow that goes wrong in its first sample."""

    def __init__(self, wrong: Callable[[Task, Policy], Any]) -> None:
        self.wrong: Callable[[Task, Policy], Any] | None = wrong

    async def __call__(self, task: Task, policy: Policy) -> Any:
        wrong, self.wrong = self.wrong, None
        if wrong is None:
            return await policy(task.prompt)
        answer = wrong(task, policy)
        return await answer if asyncio.iscoroutine(answer) else answer


def returns(value: Any) -> Once:
    async def answered(task: Task, policy: Policy) -> Any:
        await policy(task.prompt)
        return value

    return Once(answered)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"text": "a"}, "a dict"),
        (None, "a NoneType"),
        (("a", 1.0), "a tuple"),
        (b"a", "a bytes"),
        ("a\ud800", "a lone surrogate at character 1"),
    ],
)
def test_a_workflow_that_returns_no_text(tiny_model_path: Path, value: Any, said: str) -> None:
    answer = one_of(tiny_model_path, said, workflow=returns(value))
    assert f"{said}" in answer.failures[0].text
    assert "for task 't': return the text" in answer.failures[0].text


def test_a_text_of_a_class_of_the_users_is_plain_text(tiny_model_path: Path) -> None:
    class Text(str):
        pass

    (answer,) = answers(tiny_model_path, GROUP, workflow=returns(Text("mine")))
    assert {type(experience.text) for experience in answer.experiences} == {str}


@pytest.mark.parametrize(
    "prompt", [None, {}, [], 3, "x" * 50, "\ud800", [{"role": "user"}], [{"role": "user", "content": 3}]]
)
def test_a_prompt_that_is_none(tiny_model_path: Path, prompt: Any) -> None:
    answer = one_of(tiny_model_path, repr(prompt), workflow=Once(lambda task, policy: policy(prompt)))
    assert isinstance(answer.failures[0].unpack("here"), ConfigurationError)


def test_a_workflow_that_is_no_coroutine(tiny_model_path: Path) -> None:
    error = fails_with(tiny_model_path, workflow=lambda task, policy: "text")
    assert "define it as `async def workflow(task, policy)`" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, [1.0], "1", None])
def test_one_reward_that_is_none(tiny_model_path: Path, value: Any) -> None:
    values = [value, 1.0]

    async def reward(completion: str, task: Task) -> Any:
        return values.pop(0)

    assert "return a finite float" in one_of(tiny_model_path, repr(value), reward=reward).failures[0].text


def test_every_sample_has_a_task_of_its_own(tiny_model_path: Path) -> None:
    task = Task([{"role": "user", "content": "1"}], id="t", metadata={"tools": []})
    seen: list[tuple[int, int]] = []

    async def workflow(task: Task, policy: Policy) -> str:
        text = await policy(task.prompt)
        seen.append((len(task.prompt), len(task.metadata["tools"])))
        task.prompt.append({"role": "assistant", "content": "x"})  # type: ignore[union-attr]
        task.metadata["tools"].append("called")
        return text

    async def reward(completion: str, task: Task) -> float:
        return float(len(task.metadata["tools"]))  # of this sample's workflow

    (answer,) = answers(tiny_model_path, replace(GROUP, task=task), workflow=workflow, reward=reward)
    assert seen == [(1, 0), (1, 0)]
    assert [experience.reward for experience in answer.experiences] == [1.0, 1.0]


def test_calls_at_the_same_time_are_turns_in_the_order_of_the_calls(tiny_model_path: Path) -> None:
    async def together(task: Task, policy: Policy) -> str:
        await asyncio.gather(policy("a"), policy("bb"))
        return ""

    async def in_turn(task: Task, policy: Policy) -> str:
        return await policy("a") + await policy("bb")

    turns = [
        [experience.turns for experience in answers(tiny_model_path, GROUP, workflow=workflow)[0].experiences]
        for workflow in (together, in_turn)
    ]
    assert turns[0] == turns[1]
    assert [len(turn.prompt_ids) for turn in turns[0][0]] == [1, 2]


async def _cancels_its_helper(task: Task, policy: Policy) -> str:
    helper = asyncio.ensure_future(policy(task.prompt))
    await asyncio.sleep(0)
    helper.cancel()
    return await helper


async def _exits(task: Task, policy: Policy) -> str:
    raise SystemExit(3)


@pytest.mark.parametrize(("wrong", "said"), [(_cancels_its_helper, "CancelledError"), (_exits, "SystemExit")])
def test_a_workflow_that_would_end_tasks_or_the_process(tiny_model_path: Path, wrong: Any, said: str) -> None:
    answer = one_of(tiny_model_path, said, workflow=Once(wrong))
    assert isinstance(answer.failures[0].unpack("here"), RuntimeError)
    assert f"a workflow or reward raised {said}" in answer.failures[0].text


def test_what_a_sample_has_started_ends_with_it(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess.Popen, "__init__", subprocess.Popen.__init__)  # put back at the end
    note_programs()
    ended: list[str] = []
    programs: list[subprocess.Popen[bytes]] = []

    async def helper() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.append("helper")
            raise

    async def workflow(task: Task, policy: Policy) -> str:
        programs.append(subprocess.Popen("sleep 3600; true", shell=True))
        helping = asyncio.create_task(helper())
        await asyncio.gather(helping, policy("a"))
        return ""

    endless = FakeEngine(mean_tokens=10_000, tokens_per_second=10.0)
    error = fails_with(
        tiny_model_path,
        workflow=workflow,
        engine=endless,
        tolerance=Tolerance(retries=0),
        timeouts=Timeouts(workflow_s=0.3),
    )
    assert "made no call and did not return for Timeouts(workflow_s=0.3)" in str(error)
    assert ended == ["helper", "helper"]
    assert [program.wait(10) for program in programs] == [-9, -9]


def test_a_calls_answer_that_nobody_waits_for_any_more(tiny_model_path: Path) -> None:
    left: list[asyncio.Future[str]] = []

    async def workflow(task: Task, policy: Policy) -> str:
        text = await policy("a")
        left.append(asyncio.ensure_future(policy("b")))
        await asyncio.sleep(0)
        return text

    endless = FakeEngine(mean_tokens=2, tokens_per_second=200.0)
    (answer,) = answers(tiny_model_path, GROUP, workflow=workflow, engine=endless)
    assert [len(experience.turns) for experience in answer.experiences] == [1, 1]
    assert all(call.cancelled() for call in left)


def test_an_error_in_the_explorer_itself_ends_it(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise OverflowError("in the explorer")

    monkeypatch.setattr("lightning_rft.explorer.worker.explorer.Explored", broken)
    with pytest.raises(OverflowError, match="in the explorer"):
        answers(tiny_model_path, GROUP, replies=0)


def test_a_samples_clock_starts_when_the_engine_has_room_for_it(tiny_model_path: Path) -> None:
    group = replace(GROUP, seeds=tuple(range(6)))
    engine = FakeEngine(mean_tokens=1, tokens_per_second=5.0, max_num_seqs=1)
    (answer,) = answers(tiny_model_path, group, engine=engine, timeouts=Timeouts(sample_s=1.0))
    reasons = [experience.turns[0].finish_reason for experience in answer.experiences]
    assert reasons == ["stop"] * 6  # 1.2 s in all
