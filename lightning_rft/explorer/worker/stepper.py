"""The engine's thread, which alone calls the engine and steps it while there is work."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning_rft.experience import TensorInfo
from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.explorer.engines.requests import Completion, Request

__all__ = ["Stepper", "settle"]

_T = TypeVar("_T")


class Stepper:
    """Lets coroutines of one event loop use an engine: :meth:`sample` a request, or :meth:`call` between two steps.

    The engine's ``start`` must be the first call.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: dict[str, asyncio.Future[Completion]] = {}
        self._requests: list[Request] = []  # that go to the engine together
        self._calls = 0  # without an answer
        #: The error that the engine failed with, after which it is not used any more.
        self.error: BaseException | None = None
        self._halted = False
        #: Steps made so far.
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def owes(self) -> bool:
        """Whether the engine has yet to answer anything."""
        return bool(self._waiting) or self._calls > 0

    async def load(self, manifest: Sequence[TensorInfo], version: int) -> None:
        """Has the engine receive weights; after a :class:`LinkError`, which may leave half of them new, it halts.

        It steps again when a load succeeds.
        """

        def job() -> None:
            self._halted = True
            self._engine.load(manifest, version)
            self._halted = False

        await self.call(job)

    async def call(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Runs a function on the engine's thread, between two steps; raises its error, or that of an earlier step."""
        future: asyncio.Future[_T] = self._loop.create_future()

        def job() -> None:
            answer: _T | BaseException
            try:
                if self.error is not None:
                    raise self.error
                answer = function(*args, **kwargs)
            except BaseException as error:
                answer = error
            self._resolve(future, answer)

        self._jobs.put(job)
        self._calls += 1
        try:
            return await future
        finally:
            self._calls -= 1

    async def sample(self, request: Request) -> Completion:
        """Runs one request; cancelling the coroutine aborts the request.

        Requests of coroutines that run one after another begin with the same step of the engine, because a step for
        only the first would delay the others.
        """
        future: asyncio.Future[Completion] = self._loop.create_future()
        self._waiting[request.id] = future
        self._requests.append(request)
        if len(self._requests) == 1:
            self._loop.call_soon(self._add_requests)
        try:
            return await future
        finally:
            if self._waiting.pop(request.id, None) is not None:  # cancelled, or the engine refused it
                self._jobs.put(lambda: self._engine.abort([request.id]))

    def cut(self, request_ids: Sequence[str]) -> None:
        """Has requests that were made end with their next token."""
        # after those have got to the engine that are still on their way
        self._loop.call_soon(self._jobs.put, lambda: self._engine.cut(request_ids))

    def stop(self, timeout_s: float) -> None:
        """Ends the engine and the thread; gives up after ``timeout_s``."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _add_requests(self) -> None:
        requests, self._requests = self._requests, []
        self._jobs.put(lambda: self._add(requests))

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.id not in self._waiting:  # cancelled meanwhile
                continue
            try:
                if self.error is not None:
                    raise self.error
                self._engine.add(request)
            except BaseException as error:
                future = self._waiting.get(request.id)
                if future is not None:
                    self._resolve(future, error)

    def _run(self) -> None:
        busy = False
        while True:
            try:
                job = self._jobs.get(block=not busy)
            except queue.Empty:
                job = self._step
            if job is None:
                self._engine.stop()
                return
            try:
                job()
                busy = not self._halted and bool(self._waiting) and self._engine.has_work
            except BaseException as error:
                # an engine that failed once is not to be trusted: current and later requests get the error
                self.error, busy = error, False
            if self.error is not None:
                self._fail_all(self.error)

    def _step(self) -> None:
        completions = self._engine.step()
        self.steps += 1
        done = [(self._waiting.pop(completion.request_id, None), completion) for completion in completions]
        if done:  # one wake-up of the loop for all of them
            self._loop.call_soon_threadsafe(_complete, done)

    def _fail_all(self, error: BaseException) -> None:
        for request_id in list(self._waiting):
            future = self._waiting.pop(request_id, None)  # a cancelled coroutine may have taken it meanwhile
            if future is not None:
                self._resolve(future, error)

    def _resolve(self, future: asyncio.Future[Any], answer: Any) -> None:
        self._loop.call_soon_threadsafe(settle, future, answer)


def settle(future: asyncio.Future[Any], answer: Any) -> None:
    """Gives a future its result, or the error in place of one, unless its coroutine was cancelled."""
    if future.done():
        return
    if isinstance(answer, BaseException):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _complete(done: Sequence[tuple[asyncio.Future[Completion] | None, Completion]]) -> None:
    for future, completion in done:
        if future is not None:  # else its coroutine was cancelled
            settle(future, completion)
