"""The scorer, which computes rewards: coroutines on the event loop, plain functions in a process that can be killed.

A plain function may hang, or hold the interpreter lock while it computes; in a process of its own neither stops the
engine. ``python -m lightning_rft.explorer.worker.scorer FD`` is that process.
"""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lightning_rft.channel import Channel, Failure, spawn
from lightning_rft.errors import DeadlineError
from lightning_rft.experience import Task
from lightning_rft.rewards import as_reward

__all__ = ["Scorer"]

_START_S = 60.0


@dataclass
class _Call:
    completion: str
    task: Task
    answer: asyncio.Future[float]


class Scorer:
    """Calls a user's ``reward(completion, task)``, plain or ``async``, and kills a plain one after ``timeout_s``."""

    def __init__(self, reward: Callable[..., Any], timeout_s: float) -> None:
        self._reward = reward
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._waiting: list[_Call] = []
        self._answers: set[asyncio.Future[float]] = set()  # that have not come yet
        self._work: asyncio.Task[None] | None = None
        self._asked = False  # whether the process has all of the current calls
        self._stopped = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")

    async def __call__(self, completion: str, task: Task) -> float:
        """The reward of a completion, or what the reward function raised.

        Raises :class:`DeadlineError` if the call took too long, :class:`ConfigurationError` if the result is not a
        finite number, and ``CancelledError`` if the scorer was stopped.
        """
        if inspect.iscoroutinefunction(self._reward) or inspect.iscoroutinefunction(type(self._reward).__call__):
            try:
                return as_reward(await asyncio.wait_for(self._reward(completion, task), self._timeout_s), task.id)
            except TimeoutError as error:
                raise self._late(task) from error
        if self._stopped:
            raise asyncio.CancelledError
        call = _Call(completion, task, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._answers.add(call.answer)
        call.answer.add_done_callback(self._answers.discard)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._ask_waiting())
        return await call.answer

    def stop(self) -> None:
        """Ends process and thread, and cancels the calls without an answer; on the event loop's thread."""
        self._stopped = True
        for answer in list(self._answers):
            answer.cancel()
        self._kill()
        self._thread.shutdown(wait=False)

    async def _ask_waiting(self) -> None:
        # All waiting calls are sent together: samples often end together, and a round trip outlasts most rewards
        loop = asyncio.get_running_loop()
        while self._waiting and not self._stopped:
            calls, self._waiting = [call for call in self._waiting if not call.answer.done()], []
            await loop.run_in_executor(self._thread, self._ask, calls, loop)

    def _ask(self, calls: list[_Call], loop: asyncio.AbstractEventLoop) -> None:
        for index, call in enumerate(calls):
            if self._stopped:
                return
            answer: float | Exception
            try:
                answer = self._first_answer(calls[index:])
            except Exception as error:  # raised where the reward was asked for
                answer = error
            loop.call_soon_threadsafe(_settle, call.answer, answer)
        self._asked = False

    def _first_answer(self, calls: list[_Call]) -> float:
        """The reward of the first of these calls; sends them all if the process does not have them."""
        task = calls[0].task
        try:
            channel = self._channel
            if channel is None:
                process, channel = spawn(__name__)
                self._process, self._channel = process, channel
                if self._stopped:  # meanwhile, when the new process was not known yet
                    raise EOFError
                channel.send(self._reward)
                channel.receive(max(_START_S, self._timeout_s))  # its imports do not count as the reward's time
            if not self._asked:
                channel.send([(call.completion, call.task) for call in calls])
                self._asked = True
            answer = channel.receive(self._timeout_s)
        except TimeoutError as error:
            self._kill()
            raise self._late(task) from error
        except (EOFError, OSError) as error:
            self._kill()
            raise RuntimeError(f"the reward function ended its process at task {task.id!r}") from error
        if isinstance(answer, Failure):
            raise answer.unpack("the reward function")
        return float(answer)

    def _late(self, task: Task) -> DeadlineError:
        return DeadlineError(
            f"the reward of task {task.id!r} took longer than Timeouts(reward_s={self._timeout_s:g}): make it faster "
            "or raise the setting"
        )

    def _kill(self) -> None:
        process, channel, self._process, self._channel = self._process, self._channel, None, None
        self._asked = False
        if process is not None and channel is not None:
            channel.close()
            process.kill()
            process.wait(timeout=10)


def _settle(future: asyncio.Future[float], answer: float | Exception) -> None:
    if future.done():  # its sample was cancelled
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def main(fd: int) -> None:
    """Answers calls until the other side is gone."""
    channel = Channel(fd)
    try:
        reward = channel.receive()
        channel.send(None)
        while True:
            for completion, task in channel.receive():
                try:
                    answer: float | Failure = as_reward(reward(completion, task), task.id)
                except Exception as error:  # raised again where the call was made
                    answer = Failure.of(error)
                channel.send(answer)
    except (EOFError, OSError):
        pass  # the explorer is gone and needs no more rewards


if __name__ == "__main__":
    main(int(sys.argv[1]))
