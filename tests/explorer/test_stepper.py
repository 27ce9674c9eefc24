"""The engine's thread: it serves coroutines, and whatever goes wrong on it, nobody is left waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pytest

from lightning_rft.errors import LinkError
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.worker.stepper import Stepper
from lightning_rft.sampling import Sampling

T = TypeVar("T")

DEADLINE_S = 20.0


class Engine(FakeEngine):
    """Writes down who called it on which thread; with ``hold``, steps wait for ``go`` and answers are long."""

    def __init__(self, *, hold: bool = False) -> None:
        super().__init__(mean_tokens=10_000 if hold else 8)
        self.calls: list[str] = []
        self.threads: set[threading.Thread] = set()
        self.fail_in: set[str] = set()
        self.go = threading.Event()
        self.stepping = threading.Event()
        if not hold:
            self.go.set()

    def called(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.current_thread())
        if name in self.fail_in:
            raise OverflowError(name)

    def add(self, request: Request) -> None:
        self.called("add")
        super().add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        self.called("abort")
        super().abort(request_ids)

    def step(self) -> list[Completion]:
        self.stepping.set()
        assert self.go.wait(DEADLINE_S)
        self.called("step")
        return super().step()

    @property
    def has_work(self) -> bool:
        if "has_work" in self.fail_in:
            raise OverflowError("has_work")
        return super().has_work

    def stop(self) -> None:
        self.called("stop")
        super().stop()


def served(engine: Engine, use: Callable[[Stepper], Awaitable[T]]) -> T:
    async def run() -> T:
        stepper = Stepper(engine, asyncio.get_running_loop())
        try:
            await stepper.call(engine.start, "model", max_model_len=100, seed=0)
            return await asyncio.wait_for(use(stepper), DEADLINE_S)  # nobody hangs
        finally:
            engine.go.set()
            stepper.stop(DEADLINE_S)
            assert engine.calls[-1] == "stop"
            assert not stepper._thread.is_alive()

    return asyncio.run(run())


def request(name: str = "r", **changes: Any) -> Request:
    return Request(name, (1, 2), Sampling(**{"max_new_tokens": 10, "temperature": 1.0, "seed": 1} | changes))


async def seen(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, DEADLINE_S)


def test_call() -> None:
    def fail() -> None:
        raise KeyError("no")

    async def use(stepper: Stepper) -> None:
        assert await stepper.call(lambda a, *, b: a + b, 1, b=2) == 3
        with pytest.raises(KeyError, match="no"):
            await stepper.call(fail)
        assert await stepper.call(threading.current_thread) is stepper._thread  # and it lives on

    served(Engine(), use)


def test_samples_run_together_on_one_thread() -> None:
    engine = Engine()

    async def use(stepper: Stepper) -> list[Completion]:
        return await asyncio.gather(*(stepper.sample(request(str(i), seed=i)) for i in range(8)))

    done = served(engine, use)
    assert [completion.request_id for completion in done] == [str(i) for i in range(8)]
    assert len(engine.threads) == 1
    assert engine.calls.count("step") <= 10  # as a batch, not one after another


def test_what_is_cancelled_before_the_engine_has_it_never_gets_there() -> None:
    engine = Engine()

    async def use(stepper: Stepper) -> None:
        sample = asyncio.ensure_future(stepper.sample(request()))
        asyncio.get_running_loop().call_soon(sample.cancel)  # after it began, before requests are handed over
        with pytest.raises(asyncio.CancelledError):
            await sample
        await stepper.call(engine.called, "after")

    served(engine, use)
    assert "add" not in engine.calls
    assert "step" not in engine.calls


def test_a_call_comes_between_two_steps() -> None:
    engine = Engine(hold=True)

    async def use(stepper: Stepper) -> None:
        sample = asyncio.ensure_future(stepper.sample(request(max_new_tokens=50, seed=3)))
        await seen(engine.stepping)
        loaded = asyncio.ensure_future(stepper.call(engine.called, "load"))
        await asyncio.sleep(0)
        engine.go.set()
        await loaded
        await sample

    served(engine, use)
    assert engine.calls[:3] == ["add", "step", "load"]
    assert engine.calls[3] == "step"


def test_an_idle_engine_is_not_stepped() -> None:
    engine = Engine()

    async def use(stepper: Stepper) -> None:
        await stepper.sample(request())
        steps = engine.calls.count("step")
        for _ in range(5):
            await stepper.call(lambda: None)
        assert engine.calls.count("step") == steps

    served(engine, use)


def test_cancellation_takes_the_request_along() -> None:
    engine = Engine(hold=True)

    async def use(stepper: Stepper) -> None:
        sample = asyncio.ensure_future(stepper.sample(request()))
        await seen(engine.stepping)
        sample.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sample
        engine.go.set()
        assert await stepper.call(lambda: engine.has_work) is False
        assert "abort" in engine.calls
        await stepper.sample(request("next"))

    served(engine, use)


def test_an_error_in_add_reaches_its_caller_alone() -> None:
    engine = Engine()

    async def use(stepper: Stepper) -> None:
        good, bad = await asyncio.gather(
            stepper.sample(request("good")),
            stepper.sample(request("bad", max_new_tokens=1_000)),
            return_exceptions=True,
        )
        assert isinstance(good, Completion)
        assert "max_model_len=100" in str(bad)

    served(engine, use)


@pytest.mark.parametrize("where", ["step", "has_work"])
def test_an_error_of_the_engine_reaches_all_who_wait_and_all_who_come_later(where: str) -> None:
    engine = Engine()
    engine.fail_in.add(where)

    async def use(stepper: Stepper) -> None:
        errors = await asyncio.gather(*(stepper.sample(request(str(i))) for i in range(3)), return_exceptions=True)
        assert [str(error) for error in errors] == [where] * 3
        engine.fail_in.clear()  # once broken, it is not trusted again
        with pytest.raises(OverflowError, match=where):
            await stepper.sample(request("later"))
        with pytest.raises(OverflowError, match=where):
            await stepper.call(engine.called, "load")
        assert "load" not in engine.calls

    served(engine, use)


def test_an_error_in_abort_reaches_all_who_wait() -> None:
    engine = Engine(hold=True)
    engine.fail_in.add("abort")

    async def use(stepper: Stepper) -> None:
        first, second = (asyncio.ensure_future(stepper.sample(request(str(i), max_new_tokens=90))) for i in range(2))
        await seen(engine.stepping)
        first.cancel()
        await asyncio.wait([first])
        engine.go.set()
        with pytest.raises(OverflowError, match="abort"):
            await second

    served(engine, use)


def test_a_load_that_broke_off_costs_no_token() -> None:
    """What runs then goes on once weights have come."""

    class Loading(Engine):
        failed = False

        def load(self, manifest: Any, version: int) -> None:
            if not self.failed:
                self.failed = True
                raise LinkError("a member is gone")
            self.version = version

    engine = Loading(hold=True)

    async def use(stepper: Stepper) -> tuple[Completion, int]:
        sample = asyncio.ensure_future(stepper.sample(request(max_new_tokens=90)))
        await seen(engine.stepping)
        broken = asyncio.ensure_future(stepper.load([], 1))
        await asyncio.sleep(0)
        engine.go.set()
        with pytest.raises(LinkError):
            await broken
        steps = engine.calls.count("step")
        await stepper.call(lambda: None)
        assert engine.calls.count("step") == steps  # with half of the new weights it computes nothing
        await stepper.load([], 2)
        return await sample, steps

    completion, steps = served(engine, use)
    assert completion.versions == (-1,) * steps + (2,) * (90 - steps) and 0 < steps < 90
    assert engine.calls.count("step") == 90 and "abort" not in engine.calls


def test_a_cut_reaches_requests_that_are_on_their_way() -> None:
    engine = Engine(hold=True)

    async def use(stepper: Stepper) -> list[Completion]:
        running = asyncio.ensure_future(stepper.sample(request("running", max_new_tokens=90)))
        await seen(engine.stepping)
        coming = asyncio.ensure_future(stepper.sample(request("coming", max_new_tokens=90)))
        await asyncio.sleep(0)  # asked for, and not yet handed over
        stepper.cut(["running", "coming", "unknown"])
        asyncio.get_running_loop().call_soon(engine.go.set)
        return await asyncio.gather(running, coming)

    done = served(engine, use)
    assert [(len(one.token_ids), one.finish_reason) for one in done] == [(2, "length"), (1, "length")]


def test_stop_gives_up_on_an_engine_that_hangs() -> None:
    async def run() -> None:
        engine = Engine(hold=True)
        stepper = Stepper(engine, asyncio.get_running_loop())
        await stepper.call(engine.start, "model", max_model_len=100, seed=0)
        sample = asyncio.ensure_future(stepper.sample(request()))
        await seen(engine.stepping)
        stepper.stop(timeout_s=0.01)
        assert stepper._thread.is_alive()
        engine.go.set()
        stepper.stop(DEADLINE_S)
        assert not stepper._thread.is_alive()
        sample.cancel()

    asyncio.run(run())
