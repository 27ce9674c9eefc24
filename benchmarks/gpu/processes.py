"""Processes of the sections: a crash or a hang costs one row of the table."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Outcome

__all__ = ["Child", "outcomes", "preload"]

_GRACE_S = 20.0
_LOG_LINES = 3


def preload(modules: Iterable[str]) -> None:
    """Imports modules once, for every child that is forked from then on."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


class Child:
    """A process that runs ``target(send, *arguments)`` and ends with this one; it must be :meth:`ended <end>`.

    Args:
        method: ``"spawn"``, or ``"forkserver"``, which is ready sooner, but not for machines with a GPU: what is
            imported before the fork may have asked CUDA something, and CUDA survives no fork.
        log: Takes its output.
        target: Sends whatever pickles.
        arguments: Its arguments.
    """

    def __init__(self, method: str, log: Path, target: Callable[..., None], *arguments: Any) -> None:
        context: Any = multiprocessing.get_context(method)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        self._log = log
        self._receives, sends = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(sends, str(log), target, arguments))
        self._process.start()
        sends.close()

    def receive(self, timeout_s: float) -> Any:
        """What it sent; EOFError if it has ended, TimeoutError if nothing comes."""
        ready = wait([self._receives, self._process.sentinel], timeout_s)
        if not ready:
            raise TimeoutError(f"nothing came of it for {timeout_s:g} s")
        if self._receives.poll():
            return self._receives.recv()
        raise EOFError

    def ended_well(self) -> bool:
        """Whether it ends by itself, with status 0."""
        self._process.join(_GRACE_S)
        return bool(self._process.exitcode == 0)

    def status(self) -> str:
        """How it has ended, with the last lines of its log."""
        self._process.join(_GRACE_S)
        code = self._process.exitcode
        if code is None:
            how = f"its process did not end within {_GRACE_S:g} s"
        elif code < 0:
            how = f"its process died of {signal.Signals(-code).name}"
        else:
            how = f"its process ended with status {code}"
        lines = self._log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
        return f"{how}; {self._log}: {' | '.join(lines)}"

    def end(self) -> None:
        """Kills it, and what it started."""
        pid = self._process.pid
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter on macOS, of one that has ended
            os.killpg(pid, signal.SIGKILL)
        self._process.kill()  # if it was not yet a group of its own
        self._process.join(_GRACE_S)
        self._receives.close()


def _serve(sends: Connection, log: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    target(sends.send, *arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def outcomes(module: str, machine: Machine, method: str, deadline_s: float) -> Generator[Outcome, None, None]:
    """What comes of the measurements of a section, each of which may take ``deadline_s``.

    After one that crashes or hangs, another process makes those that follow.
    """
    done, what = 0, ""
    log = machine.folder / f"{module.rpartition('.')[2]}.log"
    log.unlink(missing_ok=True)
    while True:
        child = Child(method, log, _measure, module, machine, done)
        try:
            while (message := child.receive(deadline_s)) is not None:
                if isinstance(message, str):
                    what = message
                else:
                    done, what = done + 1, ""
                    yield message
            if not child.ended_well():
                yield Outcome("(the section itself)", failed=child.status())
            return
        except (EOFError, TimeoutError) as error:
            failed = str(error) or child.status()
            yield Outcome(what or "(the section itself)", failed=failed)
            if not what:  # it would not come further in another process
                return
            done, what = done + 1, ""
        finally:
            child.end()


def _measure(send: Callable[[Any], None], module: str, machine: Machine, done: int) -> None:
    """Sends the name and the outcome of each measurement but those that are done, then None."""
    section = importlib.import_module(module)
    for index, measurement in enumerate(section.measurements(machine)):
        if index >= done:
            send(measurement.what)
            send(measurement.outcome())
    send(None)
