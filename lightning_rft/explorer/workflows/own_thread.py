"""A thread for plain functions of a user, so that one that hangs holds up neither other samples nor the process."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import queue
import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

__all__ = ["OwnThread"]


class OwnThread:
    """Calls functions one after another on a thread of its own, as a database or a browser may insist on.

    The thread begins with the first call. One that hangs cannot be ended, and ends with the process.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._begun = False
        #: Calls that have not returned.
        self.calls = 0

    async def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function returns or raises; an ``async`` one runs on the event loop."""
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            return await function(*args, **kwargs)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

        def finish(value: Any, error: BaseException | None) -> None:
            self.calls -= 1
            if not done.done():  # else its sample has ended
                done.set_result((value, error))

        def job() -> None:
            value, problem = None, None
            try:
                value = function(*args, **kwargs)
            except BaseException as error:  # raised where the call was made
                problem = error
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(finish, value, problem)

        if not self._begun:
            self._begun = True
            threading.Thread(target=_work, args=(self._jobs,), name="user's functions", daemon=True).start()
        self.calls += 1
        # with the context, by which the programs that it starts are known to be the sample's
        self._jobs.put(partial(copy_context().run, job))
        value, error = await done
        if error is not None:
            raise error
        return await value if inspect.isawaitable(value) else value

    def end(self) -> None:
        """Ends the thread after the calls that were made."""
        self._jobs.put(None)


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
