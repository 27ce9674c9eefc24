"""An explorer within this process: how groups are run, tried again, given up and forgotten."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.channel import Channel
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import GroupKey, Task
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.messages import Advanced, Cancel, Ended, Explore, Explored, Several, Started
from lightning_rft.explorer.spec import ExplorerSpec
from lightning_rft.explorer.worker.explorer import Explorer
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.explorer.workflows.single_turn import SingleTurn
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
    while isinstance(message := channel.receive(30), Advanced | Ended):
        if isinstance(message, Ended):
            ended.append(message)
    return message


def answers(
    model: Path, *messages: Any, replies: int = 1, ended: list[Ended] | None = None, **changes: Any
) -> list[Any]:
    """What an explorer sends after its start when it is sent these messages."""
    told: list[Ended] = [] if ended is None else ended
    settings: dict[str, Any] = {
        "engine": FakeEngine(),
        "model": str(model),
        "workflow": SingleTurn(),
        "reward": lambda completion, task: 1.0,
        "max_model_len": 50,
        "seed": 0,
        "tolerance": Tolerance(retries=2),
        "timeouts": Timeouts(reward_s=30.0, sample_s=30.0),
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
