"""The limits around a user's coroutine: its time, what it may raise, and what it started."""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lightning_rft.errors import ConfigurationError, DeadlineError

__all__ = ["as_exception", "in_time", "kill_tree", "not_rebuilt", "note_programs", "note_tasks"]

_T = TypeVar("_T")


@dataclass
class _Started:
    """What a user's coroutine has started, as far as that is noted."""

    tasks: weakref.WeakSet[asyncio.Task[Any]] = field(default_factory=weakref.WeakSet)
    programs: list[subprocess.Popen[Any]] = field(default_factory=list)


_started: ContextVar[_Started | None] = ContextVar("started", default=None)


async def in_time(
    work: Awaitable[_T],
    limit_s: float,
    late: str,
    *,
    progressed: Callable[[], float] | None = None,
    over: asyncio.Event | None = None,
) -> _T:
    """The result of a user's coroutine; the tasks and programs that it has started end with it when it is cut short.

    The limit is from its start on, or from when it has ``progressed``, on the clock of the event loop. ``over`` cuts it
    short as well.

    Raises:
        DeadlineError: It took longer than ``limit_s``, or was ``over``, with ``late`` as its message.
        Exception: What it raised; also in place of a ``SystemExit`` or ``CancelledError`` of its own.
    """
    started = _Started()
    before = _started.set(started)
    # not wait_for: its TimeoutError could not be told from one that the coroutine raised itself
    running = asyncio.ensure_future(_contained(work))
    _started.reset(before)
    ends: list[asyncio.Future[Any]] = [running]
    if over is not None:
        ends.append(asyncio.ensure_future(over.wait()))
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        while not running.done():
            left = limit_s + max(began, progressed() if progressed else began) - loop.time()
            if left <= 0 or (over is not None and over.is_set()):
                raise DeadlineError(late)
            await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        try:
            return running.result()
        except BaseException as error:
            raise as_exception(error, "a workflow or reward") from error.__cause__
    finally:
        for waiting in ends[1:]:
            waiting.cancel()
        if not running.done():
            for task in list(started.tasks):
                task.cancel()
            for program in started.programs:
                if program.poll() is None:
                    kill_tree(program.pid)


def as_exception(error: BaseException, what: str) -> Exception:
    """The error itself, or an ordinary exception in place of one that ends interpreters or tasks."""
    if isinstance(error, Exception):
        return error
    ordinary = RuntimeError(f"{what} raised {type(error).__name__}({str(error)!r}), which no sample may end with")
    ordinary.__cause__ = error
    return ordinary


def note_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Has a loop note the tasks that a user's coroutine creates."""

    def create(loop: asyncio.AbstractEventLoop, coroutine: Any, **settings: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **settings)
        started = _started.get()
        if started is not None:
            started.tasks.add(task)
        return task

    loop.set_task_factory(create)


def note_programs() -> None:
    """Has ``subprocess``, and with it ``asyncio``, note the programs that a user's coroutine starts."""
    begin = subprocess.Popen.__init__

    @functools.wraps(begin)
    def noted(self: subprocess.Popen[Any], *args: Any, **settings: Any) -> None:
        begin(self, *args, **settings)
        started = _started.get()
        if started is not None:
            started.programs.append(self)

    subprocess.Popen.__init__ = noted  # type: ignore[method-assign]


def kill_tree(pid: int) -> None:
    """Kills a process and all that descends from it, but for what has detached itself from its parent."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # starts nothing more
        for child in _children(pid):
            kill_tree(child)
        os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    if sys.platform != "linux":
        listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
        return [int(child) for child in listed.stdout.split()]
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and _parent(folder) == pid]


def _parent(folder: Path) -> int | None:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has just ended
        return None


def not_rebuilt(what: str, error: pickle.UnpicklingError) -> ConfigurationError:
    """The error for a user's object that another process could pickle and this one cannot rebuild."""
    return ConfigurationError(
        f"{what} cannot be rebuilt in another process ({error.__cause__!r}): install what it imports, or have its "
        "folder on PYTHONPATH, and keep what must be opened out of it"
    )


async def _contained(work: Awaitable[_T]) -> _T:
    try:
        return await work
    except (KeyboardInterrupt, SystemExit) as error:  # which asyncio lets end the loop
        raise as_exception(error, "a workflow or reward") from error
