"""What counts as a hang of a workflow, on a clock that runs by itself: generation takes what it takes."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pytest

from lightning_rft.errors import ContextFull, DeadlineError
from lightning_rft.experience import Task
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.worker.answering import ask
from lightning_rft.explorer.worker.users_code import in_time, note_tasks
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.scores import Answer
from lightning_rft.settings import Sampling, Timeouts

T = TypeVar("T")
HOUR = 3600.0
TASK = Task("?", id="t")


class Clock(selectors.DefaultSelector):
    """Lets the time pass that a loop would wait for."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nothing will ever happen"
        self.now += timeout
        return super().select(0)


def run(work: Callable[[], Awaitable[T]]) -> tuple[T | BaseException, float]:
    """What a coroutine came to, and when."""
    clock = Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    note_tasks(loop)

    async def caught() -> tuple[T | BaseException, float]:
        try:
            return await work(), clock.now
        except Exception as error:
            return error, clock.now

    try:
        return loop.run_until_complete(caught())
    finally:
        left = asyncio.all_tasks(loop)
        loop.run_until_complete(asyncio.sleep(0))
        assert all(task.done() for task in left)  # cancelled, where they were not at an end
        loop.close()


class Letters:
    """A tokenizer, for prompts of ids."""

    def __len__(self) -> int:
        return 100

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "x" * len(ids)


class SlowEngine:
    """Takes so many seconds for each token."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.cut: set[str] = set()

    async def __call__(self, request: Request) -> Completion:
        sampled, limit = 0, request.sampling.max_new_tokens or 0
        while sampled < limit:
            await asyncio.sleep(self.seconds)
            sampled += 1
            if request.id in self.cut:
                limit = sampled
        return Completion(request.id, (5,) * sampled, (-1.0,) * sampled, (0,) * sampled, "length")


def answered(workflow: Any, timeouts: Timeouts, seconds: float = 10.0) -> tuple[Any, float, list[int]]:
    """What a workflow came to, when, and the tokens of its turns."""
    engine = SlowEngine(seconds)
    policies = []

    async def work() -> Answer:
        policy = Policy(
            engine,
            Letters(),
            name="run",
            sampling=Sampling(100, 1.0),
            max_model_len=1000,
            seed=0,
            cut=engine.cut.update,
        )
        policies.append(policy)
        return await ask(workflow, TASK, policy, timeouts)

    result, ended = run(work)
    return result, ended, [turn.num_tokens for turn in policies[0].turns]


async def one(task: Task, policy: Policy) -> str:
    return await policy([1, 2])


def test_an_answer_may_take_hours() -> None:
    answer, ended, tokens = answered(one, Timeouts(workflow_s=60.0), seconds=HOUR)
    assert (answer, ended, tokens) == (Answer("x" * 100), 100 * HOUR, [100])


def test_a_workflow_that_does_nothing_hangs() -> None:
    async def before(task: Task, policy: Policy) -> str:
        await asyncio.sleep(HOUR)
        return await policy([1, 2])

    async def after(task: Task, policy: Policy) -> str:
        text = await policy([1, 2])
        await asyncio.sleep(HOUR)
        return text

    for workflow, when in ((before, 60.0), (after, 1060.0)):
        error, ended, _ = answered(workflow, Timeouts(workflow_s=60.0))
        assert isinstance(error, DeadlineError) and ended == pytest.approx(when)
        assert "made no call and did not return for Timeouts(workflow_s=60)" in str(error)


def test_one_that_goes_on_in_time_may_take_long_in_all() -> None:
    async def workflow(task: Task, policy: Policy) -> str:
        for number in range(50):
            await asyncio.sleep(59.0)
            text = await policy([1, number], max_new_tokens=7)
        await asyncio.sleep(59.0)
        return text

    answer, ended, tokens = answered(workflow, Timeouts(workflow_s=60.0))
    assert isinstance(answer, Answer) and tokens == [7] * 50
    assert ended == pytest.approx(50 * (59 + 70) + 59)


def test_while_one_call_is_answered_nothing_hangs() -> None:
    async def workflow(task: Task, policy: Policy) -> str:
        waiting = asyncio.create_task(asyncio.sleep(1e9))
        text = await policy([1, 2])
        await waiting
        return text

    error, ended, _ = answered(workflow, Timeouts(workflow_s=60.0), seconds=100.0)
    assert isinstance(error, DeadlineError) and ended == pytest.approx(10_060)


def test_the_answers_of_a_sample_end_with_its_time_and_it_returns_by_itself() -> None:
    async def workflow(task: Task, policy: Policy) -> Answer:
        texts = await asyncio.gather(policy([1]), policy([2]))
        await asyncio.sleep(5.0)
        return Answer("".join(texts), reward=2.0)

    answer, ended, tokens = answered(workflow, Timeouts(sample_s=95.0))
    assert answer == Answer("x" * 20, reward=2.0)
    assert ended == pytest.approx(105.0) and tokens == [10, 10]  # with the next token


def test_who_asks_again_after_that_ends_with_the_last_answer() -> None:
    async def workflow(task: Task, policy: Policy) -> str:
        number = 0
        while True:
            number += 1
            try:
                await policy([1, number], max_new_tokens=4)
            except ContextFull:
                continue  # a loop that would not end, if it were told so

    answer, ended, tokens = answered(workflow, Timeouts(sample_s=95.0))
    assert answer == Answer("xx") and tokens == [4, 4, 2]
    assert ended == pytest.approx(100.0)


def test_one_that_comes_too_late_with_its_first_call_fails() -> None:
    async def workflow(task: Task, policy: Policy) -> str:
        await asyncio.sleep(50.0)
        return await policy([1, 2])

    error, ended, tokens = answered(workflow, Timeouts(sample_s=40.0))
    assert isinstance(error, DeadlineError) and not tokens and ended == pytest.approx(50.0)
    assert "made its first call after Timeouts(sample_s=40)" in str(error)


def test_other_functions_of_users_are_limited_from_their_beginning() -> None:
    async def work() -> None:
        await in_time(asyncio.sleep(HOUR), 30.0, "late")

    error, ended = run(work)
    assert isinstance(error, DeadlineError) and ended == pytest.approx(30.0)
