"""When the samples of a group are scored together: once none of them may still answer, and never twice."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rft.experience import Task
from lightning_rft.explorer.worker.together import Together
from lightning_rft.reward_calls import Answered
from lightning_rft.scores import Score

TASK = Task("prompt", id="t")


class Judge:
    """Scores a sample by its completion; waits, and raises, if it is told to."""

    def __init__(self, fails: int = 0) -> None:
        self.calls: list[list[str]] = []
        self.fails = fails
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def __call__(self, answered: Sequence[Answered]) -> list[Score]:
        self.calls.append([one.completion for one in answered])
        await self.may_answer.wait()
        self.fails -= 1
        if self.fails >= 0:
            raise LookupError("judge")
        return [Score(float(one.completion)) for one in answered]


def run(work: Coroutine[Any, Any, None]) -> None:
    async def to_the_end() -> None:
        await asyncio.wait_for(work, 20)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(to_the_end())


def answer(together: Together, index: int) -> asyncio.Task[Score]:
    """A sample that answers with its index, and ends with its score."""
    task = asyncio.ensure_future(together.score(index, Answered(str(index), TASK)))
    task.add_done_callback(lambda _: together.ended())
    return task


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_one_call_in_the_order_of_the_samples_whenever_they_answer() -> None:
    async def work() -> None:
        judge = Judge()
        together = Together(3, judge)
        last, first = answer(together, 2), answer(together, 0)
        await settled()
        assert judge.calls == []
        scores = await asyncio.gather(first, answer(together, 1), last)
        assert judge.calls == [["0", "1", "2"]] and scores == [Score(0.0), Score(1.0), Score(2.0)]

    run(work())


def test_samples_that_failed_are_not_waited_for() -> None:
    async def work() -> None:
        judge = Judge()
        together = Together(3, judge)
        together.ended()
        waiting = answer(together, 1)
        await settled()
        assert judge.calls == []
        together.ended()  # the last one: it is the others' turn
        assert await waiting == Score(1.0) and judge.calls == [["1"]]

    run(work())


def test_a_group_of_failures_is_not_scored() -> None:
    async def work() -> None:
        judge = Judge()
        together = Together(2, judge)
        together.ended()
        together.ended()
        await settled()
        assert judge.calls == []

    run(work())


def test_an_error_is_that_of_all_and_they_wait_for_each_other_again() -> None:
    async def work() -> None:
        judge = Judge(fails=1)
        together = Together(2, judge)

        async def tries(index: int) -> Score:
            answered = Answered(str(index), TASK)
            with pytest.raises(LookupError, match="judge"):
                await together.score(index, answered)
            return await together.score(index, answered)

        samples = [asyncio.ensure_future(tries(index)) for index in range(2)]
        assert await asyncio.gather(*samples) == [Score(0.0), Score(1.0)]
        assert judge.calls == [["0", "1"]] * 2

    run(work())


def test_one_that_gives_up_after_an_error_is_not_waited_for() -> None:
    async def work() -> None:
        judge = Judge(fails=1)
        together = Together(2, judge)
        gives_up = answer(together, 0)
        with pytest.raises(LookupError):
            await together.score(1, Answered("1", TASK))
        again = answer(together, 1)
        assert await again == Score(1.0) and judge.calls == [["0", "1"], ["1"]]
        assert isinstance(gives_up.exception(), LookupError)

    run(work())


@pytest.mark.parametrize("called", [False, True])
def test_a_cancelled_group_is_not_scored_any_more(called: bool) -> None:
    async def work() -> None:
        judge = Judge()
        judge.may_answer.clear()
        together = Together(3, judge)
        samples = [answer(together, index) for index in range(3 if called else 2)]
        if not called:
            samples.append(asyncio.ensure_future(asyncio.sleep(3600)))  # still answers
            samples[-1].add_done_callback(lambda _: together.ended())
        await settled()
        for sample in samples:
            sample.cancel()
        await asyncio.wait(samples)
        together.stop()
        await settled()
        assert all(sample.cancelled() for sample in samples)
        assert judge.calls == ([["0", "1", "2"]] if called else [])

    run(work())


def test_the_end_of_the_scorer_cancels_those_who_wait() -> None:
    async def work() -> None:
        async def stopped(answered: Sequence[Answered]) -> list[Score]:
            raise asyncio.CancelledError

        together = Together(2, stopped)
        samples = [answer(together, index) for index in range(2)]
        await asyncio.wait(samples)
        assert all(sample.cancelled() for sample in samples)

    run(work())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=3), min_size=1, max_size=5), st.integers(0, 2), st.randoms())
def test_whatever_samples_do_every_answer_is_scored(plans: list[list[bool]], fails: int, order: Any) -> None:
    """Each sample works a while, and then fails for good or answers, as often as its plan says."""

    async def work() -> None:
        judge = Judge(fails)
        together = Together(len(plans), judge)

        async def sample(index: int, plan: list[bool]) -> Score | None:
            for answers in plan:
                for _ in range(order.randrange(5)):
                    await asyncio.sleep(0)
                if answers:
                    try:
                        return await together.score(index, Answered(str(index), TASK))
                    except LookupError:
                        continue
            return None

        samples = [asyncio.ensure_future(sample(*item)) for item in enumerate(plans)]
        for one in samples:
            one.add_done_callback(lambda _: together.ended())
        scores = await asyncio.gather(*samples)
        await settled()
        for index, score in enumerate(scores):
            assert score in (None, Score(float(index)))
        if not fails:
            assert [score is not None for score in scores] == [any(plan) for plan in plans]
            assert len(judge.calls) == any(any(plan) for plan in plans)
        assert all(call == sorted(call) for call in judge.calls)

    run(work())
