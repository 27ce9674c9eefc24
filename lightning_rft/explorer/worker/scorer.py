"""The scorer, which computes rewards: coroutines on the event loop, plain functions in processes that can be killed.

Of a sum with parts of both kinds each half runs where it belongs.

A plain function may hang, or hold the interpreter lock while it computes; in a process of its own neither stops the
engine. ``python -m lightning_rft.explorer.worker.scorer FD`` is that process. There is one, and more while rewards are
slow, so that they run at the same time; the clock of each starts when its turn comes.
"""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lightning_rft.channel import Channel, Failure, spawn
from lightning_rft.errors import ConfigurationError, DeadlineError
from lightning_rft.experience import Task
from lightning_rft.explorer.worker.stepper import settle
from lightning_rft.explorer.worker.users_code import as_exception, in_time, kill_tree, not_rebuilt
from lightning_rft.hardware import available_cpus
from lightning_rft.pickling import dumps
from lightning_rft.reward_calls import Answered, RewardFunction, RewardSum, reward_of, total
from lightning_rft.scores import Sample, Score

__all__ = ["Scorer"]

_START_S = 60.0
_PATIENCE_S = 0.2  # that a call waits before another process is started
_TOGETHER_S = 0.01  # of work that a process is sent at once, since a round trip outlasts most rewards
_MOST_PROCESSES = 8


@dataclass
class _Call:
    task_id: str
    packed: bytes
    since: float
    answer: asyncio.Future[list[Score]]


class Scorer:
    """Calls a user's reward, plain or ``async``, and ends a call that takes longer than ``timeout_s``."""

    def __init__(self, reward: Callable[..., Any], timeout_s: float) -> None:
        #: How the reward is called.
        self.reward = reward_of(reward)
        #: Samples that are being scored.
        self.scoring = 0
        self._plain, self._async = self.reward.half(is_async=False), self.reward.half(is_async=True)
        self._timeout_s = timeout_s
        self._most = min(_MOST_PROCESSES, available_cpus())
        self._processes: list[_Process] = []
        self._idle: list[_Process] = []
        self._waiting: deque[_Call] = deque()
        self._answers: set[asyncio.Future[list[Score]]] = set()  # that have not come yet
        self._help: asyncio.TimerHandle | None = None
        self._each_s = _TOGETHER_S  # that rewards take
        self._stopped = False
        self._threads = ThreadPoolExecutor(self._most, thread_name_prefix="scorer")
        self._work: set[asyncio.Task[None]] = set()

    async def __call__(self, completion: str, task: Task, sample: Sample | None = None) -> Score:
        """The score of a completion; raises as :meth:`scores` does."""
        return (await self.scores([Answered(completion, task, sample)]))[0]

    async def scores(self, answered: Sequence[Answered]) -> list[Score]:
        """The scores of samples of a task.

        Raises :class:`DeadlineError` if the call took too long, :class:`ConfigurationError` if the result is not a
        finite number for each, ``CancelledError`` if the scorer was stopped, or what the reward function raised.
        """
        self.scoring += len(answered)
        try:
            halves = [] if self._plain is None else [await self._in_process(answered)]
            if self._async is not None:
                late = _late(answered[0].task.id, self._timeout_s)
                halves.append(await in_time(self._async.awaited_scores(answered), self._timeout_s, late))
        finally:
            self.scoring -= len(answered)
        return halves[0] if len(halves) == 1 else list(map(total, *halves))

    async def _in_process(self, answered: Sequence[Answered]) -> list[Score]:
        if self._stopped:
            raise asyncio.CancelledError
        task = answered[0].task
        try:
            packed = dumps(list(answered))
        except Exception as error:  # pickling runs any object's own code
            raise ConfigurationError(
                f"task {task.id!r}, as the workflow left it, cannot be sent to the process of the reward ({error}): "
                "leave only plain values in it, or make the reward `async`"
            ) from error
        loop = asyncio.get_running_loop()
        call = _Call(task.id, packed, loop.time(), loop.create_future())
        self._waiting.append(call)
        self._answers.add(call.answer)
        call.answer.add_done_callback(self._answers.discard)
        if self._idle or not self._processes:
            self._begin()
        self._expect_help()
        return await call.answer

    def stop(self) -> None:
        """Ends processes and threads, and cancels the calls without an answer; on the event loop's thread."""
        self._stopped = True
        if self._help is not None:
            self._help.cancel()
        for answer in list(self._answers):
            answer.cancel()
        for process in self._processes:
            process.stop()
        self._threads.shutdown(wait=False)

    def _begin(self) -> None:
        """Has a process that is idle, or a new one, answer what waits."""
        if not self._idle:
            self._idle.append(_Process(self._plain, self._timeout_s))
            self._processes += self._idle
        work = asyncio.create_task(self._serve(self._idle.pop()))
        self._work.add(work)
        work.add_done_callback(self._work.discard)

    def _expect_help(self) -> None:
        """Sees to it that a call does not wait long while there could be another process."""
        if self._help is None and self._waiting and len(self._processes) < self._most:
            self._help = asyncio.get_running_loop().call_later(_PATIENCE_S, self._add_help)

    def _add_help(self) -> None:
        self._help = None
        if self._waiting and asyncio.get_running_loop().time() - self._waiting[0].since >= _PATIENCE_S:
            self._begin()
        self._expect_help()

    async def _serve(self, process: _Process) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and not self._stopped:
            together = max(1, int(_TOGETHER_S / self._each_s))
            calls = [self._waiting.popleft() for _ in range(min(together, len(self._waiting)))]
            calls = [call for call in calls if not call.answer.done()]  # else its sample was cancelled
            if calls:
                self._each_s = max(1e-6, await loop.run_in_executor(self._threads, process.answer, calls, loop))
        self._idle.append(process)


class _Process:
    """A process that computes rewards one after another; started with the first, and again after it was killed."""

    def __init__(self, reward: RewardFunction | RewardSum | None, timeout_s: float) -> None:
        self._reward = reward
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._asked = False  # whether the process has all of the current calls
        self._stopped = False

    def answer(self, calls: list[_Call], loop: asyncio.AbstractEventLoop) -> float:
        """Has calls answered, on a thread that may wait; returns the seconds that each took."""
        began = loop.time()
        for index, call in enumerate(calls):
            if self._stopped:
                break
            answer: list[Score] | BaseException
            try:
                answer = self._first_answer(calls[index:])
            except Exception as error:  # raised where the reward was asked for
                answer = error
            loop.call_soon_threadsafe(settle, call.answer, answer)
        self._asked = False
        return (loop.time() - began) / len(calls)

    def stop(self) -> None:
        """Ends the process, from another thread."""
        self._stopped = True
        process = self._process
        if process is not None and process.poll() is None:
            kill_tree(process.pid)
            process.wait(timeout=10)

    def _first_answer(self, calls: list[_Call]) -> list[Score]:
        """The answer to the first of these calls; sends them all if the process does not have them."""
        task_id = calls[0].task_id
        try:
            channel = self._channel or self._start()
            if not self._asked:
                channel.send([call.packed for call in calls])
                self._asked = True
            answer = channel.receive(self._timeout_s)
        except TimeoutError as error:
            self._kill()
            raise DeadlineError(_late(task_id, self._timeout_s)) from error
        except (EOFError, OSError) as error:
            status = self._kill()
            raise RuntimeError(f"the reward function ended its process at task {task_id!r} ({status})") from error
        if isinstance(answer, Failure):
            raise as_exception(answer.unpack("the reward function"), "the reward function")
        scores: list[Score] = answer
        return scores

    def _start(self) -> Channel:
        self._process, channel = spawn(__name__)
        self._channel = channel
        if self._stopped:  # meanwhile, when the new process was not known yet
            raise EOFError
        try:
            channel.send(self._reward)
            loaded = channel.receive(max(_START_S, self._timeout_s))  # imports do not count as the reward's time
        except TimeoutError as error:
            raise EOFError("was not ready in time") from error
        if isinstance(loaded, Failure):
            self._kill()
            raise as_exception(loaded.unpack("the process of the reward function"), "the reward function")
        return channel

    def _kill(self) -> str:
        """Ends the process and what it has started; returns how it ended, in words."""
        process, channel, self._process, self._channel = self._process, self._channel, None, None
        self._asked = False
        if process is None or channel is None:
            return "it never started"
        channel.close()
        ended = process.poll() is not None
        if not ended:
            kill_tree(process.pid)
        status = process.wait(timeout=10)
        return f"status {status}" if ended else "its line broke off"


def _late(task_id: str, limit_s: float) -> str:
    return (
        f"the reward of task {task_id!r} took longer than Timeouts(reward_s={limit_s:g}): make it faster or raise the "
        "setting"
    )


def main(fd: int) -> None:
    """Answers calls until the other side is gone."""
    channel = Channel(fd, patient=True)
    try:
        try:
            reward = channel.receive()
        except pickle.UnpicklingError as error:
            channel.send(Failure.of(not_rebuilt("the reward", error)))
            return
        channel.send(None)
        while True:
            for packed in channel.receive():
                channel.send(_answer(reward, packed))
    except (EOFError, OSError):
        pass  # the explorer is gone and needs no more rewards


def _answer(reward: RewardFunction | RewardSum, packed: bytes) -> list[Score] | Failure:
    try:
        return reward.scores(pickle.loads(packed))
    except BaseException as error:  # raised again where the call was made
        return Failure.of(as_exception(error, "the reward function"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
