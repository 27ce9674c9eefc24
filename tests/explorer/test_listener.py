"""Waiting for explorers: always with an end, also where rank 0 itself is what hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightning_rft.errors import DeadlineError
from lightning_rft.experience import GroupKey
from lightning_rft.explorer.listener import Listener
from lightning_rft.explorer.messages import Started
from lightning_rft.explorer.roster import Roster


class Pool:
    """Explorers that have sent what is in ``messages``."""

    starting = False

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.killed: list[int] = []
        self.polled = threading.Semaphore(0)

    def poll(self, timeout_s: float) -> list[tuple[int, Any]]:
        self.polled.release()
        if not self.messages:
            time.sleep(0.01)
        messages, self.messages = self.messages, []
        return [(0, message) for message in messages]

    def kill(self, explorer: int, blame: str) -> None:
        self.killed.append(explorer)


class Hangs:
    """Is called with a message, and returns when it is told to."""

    def __init__(self, listener: Callable[[], Listener], *, locked: bool) -> None:
        self.began, self.ends = threading.Event(), threading.Event()
        self._listener = listener
        self._locked = locked

    def __call__(self, explorer: int, message: Any) -> None:
        if self._locked:
            with self._listener().locked():
                self._hang()
        else:
            self._hang()

    def _hang(self) -> None:
        self.began.set()
        assert self.ends.wait(30)


@pytest.fixture(params=[False, True], ids=["its user's function", "with the lock"])
def hung(request: pytest.FixtureRequest) -> Iterator[tuple[Listener, list[BaseException]]]:
    """A listener whose thread hangs in a message, and what interrupts a wait for it."""
    interrupts: list[BaseException] = []

    def check_interrupt() -> None:
        if interrupts:
            raise interrupts[0]

    pool = Pool()
    handle = Hangs(lambda: listener, locked=request.param)
    listener = Listener(pool, Roster(timeout_s=0.5), handle, check_interrupt)  # type: ignore[arg-type]
    pool.messages.append("news")
    listener.start()
    assert handle.began.wait(30)
    yield listener, interrupts
    handle.ends.set()
    listener.close()


def test_a_wait_ends_though_the_thread_hangs(hung: tuple[Listener, list[BaseException]]) -> None:
    listener, _ = hung
    with pytest.raises(DeadlineError, match=r"(?s)busy for Timeouts\(progress_s=0.5\).*self.ends.wait"):
        listener.wait(lambda: False, "nothing")


def test_a_wait_for_a_thread_that_hangs_can_be_interrupted(hung: tuple[Listener, list[BaseException]]) -> None:
    listener, interrupts = hung
    interrupts.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        listener.wait(lambda: False, "nothing")


def test_closing_does_not_wait_for_a_function_that_hangs(hung: tuple[Listener, list[BaseException]]) -> None:
    listener, _ = hung
    began = time.monotonic()
    listener.close()
    assert time.monotonic() - began < 10


def test_nobody_is_blamed_for_what_nobody_heard() -> None:
    """Messages wait while rank 0 is stopped, or in a slow filter: explorers that sent them are not hung."""
    roster = Roster(timeout_s=10)
    roster.started(0, Started("float32", 1, False, 64))
    roster.asked(0, GroupKey(0, 0), samples=4, now=0)
    assert roster.overdue(now=45) == [0]
    roster.excuse(40)
    assert roster.overdue(now=45) == []
    assert roster.overdue(now=51) == [0]


def test_a_listener_that_was_away_excuses_explorers(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, roster = Pool(), Roster(timeout_s=60)
    roster.started(0, Started("float32", 1, False, 64))
    roster.asked(0, GroupKey(0, 0), samples=4, now=time.monotonic())
    away = threading.Event()
    handled = threading.Event()
    clock = time.monotonic

    def handle(explorer: int, message: Any) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 3600)  # an hour of SIGSTOP
        handled.set()
        away.wait(30)

    listener = Listener(pool, roster, handle, lambda: None)  # type: ignore[arg-type]
    pool.messages.append("news")
    listener.start()
    assert handled.wait(30)
    away.set()
    for _ in range(3):  # the first is over, and after the third it has looked at what it heard in the second
        assert pool.polled.acquire(timeout=30)
    listener.close()
    assert pool.killed == []
