"""Rewards: every kind of callable, and none of them can hang or end the explorer."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from lightning_rft.errors import ConfigurationError, DeadlineError, ExplorerError
from lightning_rft.experience import Task, Turn
from lightning_rft.explorer.worker.scorer import Scorer
from lightning_rft.reward_calls import Answered, RewardSum
from lightning_rft.scores import Sample, Score
from tests.processes import until

T = TypeVar("T")

TASK = Task("prompt", answer=2.0, id="t1")


class Rewards(Scorer):
    """A scorer whose answers are plain numbers."""

    async def __call__(self, completion: str, task: Task, sample: Sample | None = None) -> float:  # type: ignore[override]
        score = await super().__call__(completion, task, sample)
        assert not score.parts
        return score.reward


def scored(
    reward: Callable[..., Any],
    use: Callable[[Any], Awaitable[T]],
    timeout_s: float = 30.0,
    kind: type[Scorer] = Rewards,
) -> T:
    async def run() -> T:
        scorer = kind(reward, timeout_s)
        try:
            return await use(scorer)
        finally:
            scorer.stop()
            assert all(process._process is None or process._process.poll() for process in scorer._processes)

    return asyncio.run(run())


def function(completion: str, task: Task) -> float:
    return len(completion) + task.answer


async def coroutine(completion: str, task: Task) -> float:
    await asyncio.sleep(0)
    return function(completion, task)


class Object:
    def __init__(self, weight: int) -> None:
        self.weight = weight

    def __call__(self, completion: str, task: Task) -> float:
        return self.weight * function(completion, task)

    def method(self, completion: str, task: Task) -> float:
        return self(completion, task)


class AsyncObject(Object):
    async def __call__(self, completion: str, task: Task) -> float:  # type: ignore[override]
        await asyncio.sleep(0)
        return self.weight * function(completion, task)


@pytest.mark.parametrize(
    ("reward", "value"),
    [
        (function, 5.0),
        (lambda completion, task: task.answer, 2.0),
        (lambda completion, task: True, 1.0),
        (Object(2), 10.0),
        (Object(3).method, 15.0),
        (coroutine, 5.0),
        (AsyncObject(2), 10.0),
    ],
    ids=["function", "lambda", "bool", "object", "method", "coroutine", "async_object"],
)
def test_kinds_of_callables(reward: Callable[..., Any], value: float) -> None:
    result = scored(reward, lambda scorer: scorer("abc", TASK))
    assert type(result) is float
    assert result == value


SCRIPT = """
import math
OFFSET = 10
class Unhappy(Exception):
    pass
def helper(text):
    return math.sqrt(len(text)) + OFFSET
def reward(completion, task):
    if completion == "bad":
        raise Unhappy("no")
    return helper(completion)
"""


def test_a_reward_of_a_script_or_notebook() -> None:
    script = types.ModuleType("__main__")
    original = sys.modules["__main__"]
    sys.modules["__main__"] = script
    try:
        exec(SCRIPT, vars(script))

        async def use(scorer: Scorer) -> None:
            assert await scorer("four", TASK) == 12.0
            with pytest.raises(script.Unhappy, match="no"):  # its own class, not a copy
                await scorer("bad", TASK)
            assert await scorer("four", TASK) == 12.0

        scored(script.reward, use)
    finally:
        sys.modules["__main__"] = original


def test_plain_functions_run_in_a_process_of_their_own_and_async_ones_here() -> None:
    async def here(completion: str, task: Task) -> int:
        return os.getpid()

    async def twice(scorer: Scorer) -> tuple[float, float]:
        return await scorer("", TASK), await scorer("", TASK)

    first, second = scored(lambda completion, task: os.getpid(), twice)
    assert first == second != os.getpid()  # started once
    assert scored(here, twice) == (os.getpid(), os.getpid())


def test_exceptions_carry_their_traceback() -> None:
    def reward(completion: str, task: Task) -> float:
        raise LookupError(completion)  # the line that is to blame

    async def use(scorer: Scorer) -> BaseException:
        with pytest.raises(LookupError, match="abc") as caught:
            await scorer("abc", TASK)
        return caught.value

    cause = scored(reward, use).__cause__
    assert isinstance(cause, ExplorerError)
    assert "in the reward function" in str(cause)
    assert "the line that is to blame" in str(cause)


@pytest.mark.parametrize("value", [float("nan"), 1e39, [1.0], None, "1.0"])
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_what_is_no_number(value: Any, kind: str) -> None:
    async def later(completion: str, task: Task) -> Any:
        return value

    reward = later if kind == "async" else lambda completion, task: value
    with pytest.raises(ConfigurationError, match=r"reward returned .* for task 't1': return a finite float"):
        scored(reward, lambda scorer: scorer("", TASK))


def test_a_reward_that_hangs_is_killed_and_the_next_call_works() -> None:
    def reward(completion: str, task: Task) -> float:
        if completion == "hang":
            time.sleep(3600)
        return float(os.getpid())

    async def use(scorer: Scorer) -> None:
        first = await scorer("", TASK)
        with pytest.raises(
            DeadlineError, match=r"task 't1' took longer than Timeouts\(reward_s=0.5\): make it faster or"
        ):
            await scorer("hang", TASK)
        with pytest.raises(ProcessLookupError):
            os.kill(int(first), 0)
        assert await scorer("", TASK) != first

    scored(reward, use, timeout_s=0.5)


class SlowToLoad:
    def __reduce__(self) -> Any:
        return _slowly, ()

    def __call__(self, completion: str, task: Task) -> float:
        return 1.0


def _slowly() -> SlowToLoad:
    time.sleep(0.3)
    return SlowToLoad()


def test_what_a_reward_imports_is_not_its_time() -> None:
    assert scored(SlowToLoad(), lambda scorer: scorer("", TASK), timeout_s=0.2) == 1.0


def test_an_async_reward_that_hangs_is_cancelled() -> None:
    cancelled = []

    async def reward(completion: str, task: Task) -> float:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return 1.0

    with pytest.raises(DeadlineError, match=r"reward_s=0.01"):
        scored(reward, lambda scorer: scorer("", TASK), timeout_s=0.01)
    assert cancelled == [True]


def test_a_reward_that_ends_its_process_and_the_next_call_works() -> None:
    def reward(completion: str, task: Task) -> float:
        if completion == "exit":
            os._exit(3)
        return 1.0

    async def use(scorer: Scorer) -> float:
        with pytest.raises(RuntimeError, match="the reward function ended its process at task 't1'"):
            await scorer("exit", TASK)
        return await scorer("", TASK)

    assert scored(reward, use) == 1.0


def test_a_process_that_died_between_two_calls() -> None:
    async def use(scorer: Scorer) -> float:
        await scorer("", TASK)
        (process,) = (process._process for process in scorer._processes)
        assert process is not None
        process.kill()
        process.wait()
        with pytest.raises(RuntimeError, match="ended its process at task 't1' \\(status -9\\)"):
            await scorer("", TASK)
        return await scorer("", TASK)

    assert scored(lambda completion, task: 1.0, use) == 1.0


def test_a_slow_reward_does_not_hold_up_the_explorer() -> None:
    async def use(scorer: Scorer) -> int:
        slow = asyncio.ensure_future(scorer("", TASK))
        ticks = 0
        while not slow.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks

    assert scored(lambda completion, task: time.sleep(0.2) or 1.0, use) > 10


def test_calls_that_wait_together_are_answered_each_by_its_own() -> None:
    def reward(completion: str, task: Task) -> float:
        if completion == "2":
            os._exit(3)
        if completion == "4":
            raise LookupError(completion)
        if completion == "6":
            time.sleep(3600)
        return float(completion)

    async def use(scorer: Scorer) -> list[Any]:
        calls = [asyncio.ensure_future(scorer(str(index), TASK)) for index in range(10)]
        await asyncio.sleep(0)  # all wait now
        calls[8].cancel()
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = scored(reward, use, timeout_s=2.0)
    kinds = {2: RuntimeError, 4: LookupError, 6: DeadlineError, 8: asyncio.CancelledError}
    for index, answer in enumerate(answers):
        assert isinstance(answer, kinds[index]) if index in kinds else answer == float(index)


@pytest.mark.parametrize("asked", [False, True])
def test_a_scorer_that_is_stopped_cancels_what_waits_and_starts_no_process(asked: bool) -> None:
    async def use(scorer: Scorer) -> None:
        await scorer("", TASK)
        (process,) = scorer._processes
        while process._asked:  # of the call before
            await asyncio.sleep(0.001)
        calls = [asyncio.ensure_future(scorer("hang", TASK)) for _ in range(2)]
        await asyncio.sleep(0)
        while asked and not process._asked:
            await asyncio.sleep(0.001)
        running = process._process
        scorer.stop()
        assert running is not None and running.poll() is not None
        calls.append(asyncio.ensure_future(scorer("", TASK)))  # afterwards, too, nobody waits for ever
        done, _ = await asyncio.wait(calls, timeout=30)
        assert [call.cancelled() for call in done] == [True, True, True]
        await asyncio.to_thread(scorer._threads.shutdown, wait=True)
        assert len(scorer._processes) == 1

    def reward(completion: str, task: Task) -> float:
        if completion:
            time.sleep(3600)
        return 1.0

    scored(reward, use)


def test_the_clock_of_a_reward_starts_when_its_turn_comes_and_several_run_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_rft.explorer.worker.scorer.available_cpus", lambda: 2)

    def reward(completion: str, task: Task) -> float:
        time.sleep(0.3)
        return float(os.getpid())

    async def use(scorer: Scorer) -> list[float]:
        return await asyncio.gather(*(scorer("", TASK) for _ in range(8)))

    assert len(set(scored(reward, use, timeout_s=2.0))) == 2  # 8 x 0.3 s in all are longer than the limit


def test_quick_rewards_take_one_process() -> None:
    async def use(scorer: Scorer) -> int:
        await scorer("", TASK)
        await asyncio.gather(*(scorer("", TASK) for _ in range(500)))
        return len(scorer._processes)

    assert scored(lambda completion, task: 1.0, use) == 1


@pytest.mark.parametrize("kind", ["plain", "async", "sum"])
def test_a_reward_that_would_end_the_interpreter(kind: str) -> None:
    async def later(completion: str, task: Task) -> float:
        sys.exit(3)

    rewards: dict[str, Callable[..., Any]] = {"plain": lambda completion, task: sys.exit(3), "async": later}
    rewards["sum"] = RewardSum({"later": later, "coroutine": coroutine})

    async def use(scorer: Scorer) -> None:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"raised SystemExit\('3'\)"):
                await scorer("", TASK)

    scored(rewards[kind], use)


def test_a_timeout_of_a_rewards_own_is_its_own() -> None:
    async def reward(completion: str, task: Task) -> float:
        raise TimeoutError("of the server")

    with pytest.raises(TimeoutError, match="of the server") as caught:
        scored(reward, lambda scorer: scorer("", TASK))
    assert not isinstance(caught.value, DeadlineError)


class OnlyHere:
    def __reduce__(self) -> Any:
        return _fails_elsewhere, (os.getpid(),)

    def __call__(self, completion: str, task: Task) -> float:
        return 1.0


def _fails_elsewhere(pid: int) -> OnlyHere:
    if os.getpid() != pid:
        raise ModuleNotFoundError("No module named 'judge'")
    return OnlyHere()


def test_a_reward_that_cannot_be_rebuilt_says_so() -> None:
    async def use(scorer: Scorer) -> None:
        for _ in range(2):
            with pytest.raises(
                ConfigurationError, match=r"reward cannot be rebuilt .*No module named 'judge'.*: install"
            ):
                await scorer("", TASK)

    scored(OnlyHere(), use)


def test_a_task_that_cannot_be_sent_costs_that_call() -> None:
    async def use(scorer: Scorer) -> float:
        with pytest.raises(ConfigurationError, match=r"task 't2', .* cannot be sent .*: leave only plain values"):
            await scorer("", Task("p", id="t2", metadata={"lock": threading.Lock()}))
        return await scorer("", TASK)

    assert scored(lambda completion, task: 1.0, use) == 1.0


def test_what_a_reward_has_started_ends_with_it(tmp_path: Path) -> None:
    def reward(completion: str, task: Task) -> float:
        sleeper = subprocess.Popen(["sleep", "3600"], start_new_session=True)
        Path(completion).write_text(str(sleeper.pid))
        sleeper.wait()
        return 1.0

    async def use(scorer: Scorer) -> None:
        with pytest.raises(DeadlineError):
            await scorer(str(tmp_path / "pid"), TASK)

    scored(reward, use, timeout_s=1.0)
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", "the end of the program")


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_reward_that_asks_for_it_gets_the_sample(kind: str) -> None:
    turn = Turn((1,), (2, 3), (-0.5, -0.5), (0, 0), "stop")

    def plain(completion: str, task: Task, sample: Sample) -> float:
        return float(sample.turns[0].token_ids[-1] + len(sample.raw_texts[0]))

    async def later(completion: str, task: Task, *, sample: Sample) -> float:
        return plain(completion, task, sample)

    async def use(scorer: Scorer) -> float:
        assert scorer.reward.wants_sample
        return await scorer("", TASK, Sample((turn,), ("<think>",)))

    assert scored(plain if kind == "plain" else later, use) == 10.0


# Sums, and rewards of all samples


def test_of_a_sum_plain_parts_run_in_a_process_and_async_ones_here() -> None:
    async def here(completion: str, task: Task) -> int:
        return os.getpid()

    reward = RewardSum({"here": here, "there": lambda completion, task: os.getpid()}, {"here": 0})

    async def use(scorer: Scorer) -> Score:
        return await scorer("", TASK)

    score = scored(reward, use, kind=Scorer)
    assert score.parts["here"] == os.getpid() != score.parts["there"] == score.reward


def test_a_plain_part_that_hangs_is_killed_and_async_ones_are_not_asked() -> None:
    asked = []

    async def here(completion: str, task: Task) -> float:
        asked.append(completion)
        return 1.0

    def there(completion: str, task: Task) -> float:
        if completion == "hang":
            time.sleep(3600)
        return 1.0

    async def use(scorer: Scorer) -> Score:
        with pytest.raises(DeadlineError, match="reward_s=1"):
            await scorer("hang", TASK)
        return await scorer("a", TASK)

    assert scored(RewardSum({"here": here, "there": there}), use, timeout_s=1.0, kind=Scorer).reward == 2.0
    assert asked == ["a"]


GROUP = [Answered(text, Task("prompt", answer=index, id="t1")) for index, text in enumerate(("a", "bb", "ccc"))]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_reward_of_all_samples_is_called_once(kind: str) -> None:
    def plain(completions: list[str], tasks: list[Task]) -> list[float]:
        assert len(completions) == len(tasks)
        return [len(completions) * 100 + len(completions[task.answer]) * 10 + task.answer for task in tasks]

    async def later(completions: list[str], tasks: list[Task]) -> list[float]:
        return plain(completions, tasks)

    async def use(scorer: Scorer) -> list[Score]:
        scoring = asyncio.ensure_future(scorer.scores(GROUP))
        await asyncio.sleep(0)
        assert scorer.scoring == 3
        scores = await scoring
        assert scorer.scoring == 0
        return scores

    scores = scored(plain if kind == "plain" else later, use, kind=Scorer)
    assert scores == [Score(310.0), Score(321.0), Score(332.0)]


def test_a_reward_of_all_samples_that_raises_hangs_or_dies_and_the_next_call_works() -> None:
    def reward(completions: list[str], tasks: list[Task], samples: list[Any]) -> list[float]:
        what = tasks[0].metadata.get("what")
        if what == "raises":
            raise LookupError("judge")
        if what == "hangs":
            time.sleep(3600)
        if what == "dies":
            os._exit(3)
        return [1.0] * (2 if what == "short" else 3)

    async def use(scorer: Scorer) -> list[Score]:
        assert scorer.reward.batched and scorer.reward.wants_sample
        kinds = {"raises": LookupError, "hangs": DeadlineError, "dies": RuntimeError, "short": ConfigurationError}
        for what, error in kinds.items():
            task = Task("prompt", id="t1", metadata={"what": what})
            with pytest.raises(error):
                await scorer.scores([Answered("", task)] * 3)
            assert scorer.scoring == 0
        return await scorer.scores(GROUP)

    assert scored(reward, use, timeout_s=1.0, kind=Scorer) == [Score(1.0)] * 3
