"""A client that tries again, hangs up, or outlives its sample, in every order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_rft.explorer.worker.openai_requests import Refusal
from lightning_rft.explorer.worker.session import Response, Session


class Desk:
    """A session whose calls are answered by hand, and what became of its clients."""

    def __init__(self) -> None:
        self.policy = SimpleNamespace(counts=Counter())
        self.session = Session(self.policy, None)  # type: ignore[arg-type]
        self.answers: list[asyncio.Future[str]] = []  # of the calls that were sampled, to be set

    async def sample(self) -> Response:
        self.answers.append(asyncio.get_running_loop().create_future())
        return Response((await self.answers[-1]).encode(), "text/plain")

    async def asks(self, request: bytes = b"x", retry: int = 0) -> asyncio.Task[Response]:
        """A client that waits for its answer."""
        client = asyncio.ensure_future(self.session.ask(request, retry, self.sample))
        await settled()
        return client

    async def answer(self, index: int, text: str) -> None:
        self.answers[index].set_result(text)
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def in_loop(test: Callable[[Desk], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            await test(Desk())

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


def said(client: asyncio.Task[Response]) -> str:
    return client.result().body.decode()


@in_loop
async def test_a_retry_gets_the_answer_that_was_lost(desk: Desk) -> None:
    first = await desk.asks()
    await desk.answer(0, "one")
    again, third = await desk.asks(retry=1), await desk.asks(retry=2)
    assert said(first) == said(again) == said(third) == "one" and len(desk.answers) == 1
    assert desk.policy.counts == {"endpoint_retries": 2}


@in_loop
async def test_a_retry_joins_the_call_that_runs(desk: Desk) -> None:
    first, again = await desk.asks(), await desk.asks(retry=1)
    first.cancel()  # hangs up
    await settled()
    await desk.answer(0, "one")
    assert said(again) == "one" and len(desk.answers) == 1


@in_loop
async def test_a_call_ends_when_its_last_client_hangs_up(desk: Desk) -> None:
    first, again = await desk.asks(), await desk.asks(retry=1)
    for client in (first, again):
        assert not desk.answers[0].cancelled()
        client.cancel()
        await settled()
    assert desk.answers[0].cancelled()
    later = await desk.asks(retry=2)  # samples anew: there is no answer
    await desk.answer(1, "two")
    assert said(later) == "two"


@pytest.mark.parametrize("moments", range(6))
def test_a_retry_at_any_moment_of_hanging_up_is_answered(moments: int) -> None:
    @in_loop
    async def test(desk: Desk) -> None:
        first = await desk.asks()
        first.cancel()
        for _ in range(moments):  # of the loop: the client is gone, the call is told to end, and has ended
            await asyncio.sleep(0)
        again = asyncio.ensure_future(desk.session.ask(b"x", 1, desk.sample))
        await settled()
        (running,) = (index for index, answer in enumerate(desk.answers) if not answer.cancelled())
        await desk.answer(running, "one")
        assert said(again) == "one"

    test()


@in_loop
async def test_hanging_up_takes_back_no_answer(desk: Desk) -> None:
    first = await desk.asks()
    desk.answers[0].set_result("one")
    await asyncio.sleep(0)  # it is sampled; its client does not know
    await asyncio.sleep(0)
    first.cancel()
    await settled()
    assert said(await desk.asks(retry=1)) == "one" and len(desk.answers) == 1


@in_loop
async def test_calls_alike_are_calls_of_their_own(desk: Desk) -> None:
    both = [await desk.asks(), await desk.asks()]
    await desk.answer(0, "one")
    await desk.answer(1, "two")
    assert [said(client) for client in both] == ["one", "two"]
    again = [await desk.asks(retry=1), await desk.asks(retry=1)]
    assert {said(client) for client in again} == {"one", "two"} and len(desk.answers) == 2


@in_loop
async def test_a_call_that_is_made_anew_is_sampled_anew(desk: Desk) -> None:
    first = await desk.asks()
    await desk.answer(0, "one")
    second = await desk.asks()  # its client has read the first answer, else this would be a retry
    await desk.answer(1, "two")
    assert (said(first), said(second), said(await desk.asks(retry=1))) == ("one", "two", "two")
    third = await desk.asks()
    third.cancel()
    await settled()
    again = await desk.asks(retry=1)  # of the third, which was not sampled, and not of the second
    await desk.answer(3, "four")
    assert said(again) == "four"


@in_loop
async def test_a_failure_is_no_answer(desk: Desk) -> None:
    first = await desk.asks()
    desk.answers[0].set_exception(Refusal("no"))
    with pytest.raises(Refusal, match="no"):
        await first
    again = await desk.asks(retry=1)
    await desk.answer(1, "yes")
    assert said(again) == "yes" and not desk.policy.counts


@in_loop
async def test_other_requests_are_not_retried(desk: Desk) -> None:
    await desk.asks(b"x")
    await desk.answer(0, "one")
    other = await desk.asks(b"y", retry=1)
    await desk.answer(1, "two")
    assert said(other) == "two"


@in_loop
async def test_the_end_of_a_sample_ends_its_calls(desk: Desk) -> None:
    answered, running = await desk.asks(b"x"), await desk.asks(b"y")
    await desk.answer(0, "one")
    desk.session.close()
    await settled()
    assert said(answered) == "one" and desk.answers[1].cancelled()
    for client in (running, await desk.asks(b"x", retry=1), await desk.asks(b"z")):
        with pytest.raises(Refusal, match="the sample of this API key has ended") as refused:
            await client
        assert refused.value.status == 401
    assert len(desk.answers) == 2
