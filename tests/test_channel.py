"""The line between two processes: failures arrive with their traceback, waits end, user functions travel by value."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.channel import Channel, Failure, spawn
from lightning_rft.errors import ExplorerError
from tests.processes import until

# Failures


class Travels(Exception):
    def __init__(self, *args: object, code: int = 0) -> None:
        super().__init__(*args)
        self.code = code


class KeepsALock(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class CannotBeMadeAgain(Exception):
    def __init__(self, *, reason: str, code: int) -> None:
        super().__init__(f"{reason} ({code})")


def caught(error: Exception) -> Exception:
    try:
        raise error  # the line that is to blame
    except Exception as raised:
        return raised


def sent(error: Exception) -> BaseException:
    failure: Failure = pickle.loads(pickle.dumps(Failure.of(caught(error))))
    return failure.unpack("explorer 3")


def test_an_exception_that_pickles_is_itself_again() -> None:
    error = sent(Travels("bad", 1, code=7))
    assert type(error) is Travels
    assert error.args == ("bad", 1)
    assert error.code == 7
    assert isinstance(error.__cause__, ExplorerError)
    assert str(error.__cause__).startswith("in explorer 3:\nTraceback")
    assert "the line that is to blame" in str(error.__cause__)


@pytest.mark.parametrize(
    ("error", "last"), [(KeepsALock("locked"), "locked"), (CannotBeMadeAgain(reason="gone", code=3), "gone (3)")]
)
def test_an_exception_that_does_not_travel_is_told_in_full(error: Exception, last: str) -> None:
    arrived = sent(error)
    assert type(arrived) is ExplorerError
    assert "the line that is to blame" in str(arrived)
    assert str(arrived).endswith(f"{type(error).__name__}: {last}\n")


def test_an_exception_whose_class_is_known_only_there() -> None:
    packed = pickle.dumps(Travels("bad")).replace(b"Travels", b"Trav3ls")
    arrived = Failure(packed, "its traceback").unpack("explorer 0")
    assert type(arrived) is ExplorerError
    assert "its traceback" in str(arrived)


def test_causes_are_told_too() -> None:
    error = Travels("outer")
    error.__cause__ = caught(KeyError("inner"))
    assert "KeyError: 'inner'" in str(sent(error).__cause__)


# Channels

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    channels = Channel(ours.detach()), Channel(theirs.detach())
    yield channels
    for channel in channels:
        channel.close()


def test_messages_come_in_order(pair: Pair) -> None:
    for number in range(3):
        pair[0].send(number)
    assert [pair[1].receive(1) for _ in range(3)] == [0, 1, 2]


def test_a_wait_ends(pair: Pair) -> None:
    with pytest.raises(TimeoutError, match=r"no message within 0.01 s"):
        pair[0].receive(0.01)
    pair[1].send("late")
    assert pair[0].receive(1) == "late"


def test_end_of_file(pair: Pair) -> None:
    pair[1].send("last words")
    pair[1].close()
    assert pair[0].receive(1) == "last words"
    with pytest.raises(EOFError):
        pair[0].receive(1)
    with pytest.raises(OSError, match="Broken pipe"):
        pair[0].send("too late")


def test_a_peer_that_does_not_read_blocks_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_rft.channel._SEND_DEADLINE_S", 1)
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours.detach())
        began = time.monotonic()
        with pytest.raises(OSError, match="temporarily unavailable"):
            channel.send(bytes(10_000_000))
        assert time.monotonic() - began < 30
        channel.close()


class OpensAFile:
    def __reduce__(self) -> Any:
        return open, ("/does/not/exist",)


def test_an_object_that_cannot_be_rebuilt_is_not_taken_for_a_broken_line(pair: Pair) -> None:
    pair[0].send(OpensAFile())
    with pytest.raises(pickle.UnpicklingError, match="FileNotFoundError"):
        pair[1].receive(1)


def test_threads_do_not_mix_their_messages(pair: Pair) -> None:
    threads = [
        threading.Thread(target=lambda i=i: [pair[0].send(bytes([i]) * 5_000) for _ in range(20)]) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    messages = [pair[1].receive(10) for _ in range(80)]
    for thread in threads:
        thread.join()
    assert sorted(messages) == sorted(bytes([i]) * 5_000 for i in range(4) for _ in range(20))


# Processes

ECHO = """
import os, sys
from lightning_rft.channel import Channel
channel = Channel(int(sys.argv[1]))
print("hello from the child", flush=True)
try:
    while True:
        function, *arguments = channel.receive()
        channel.send(function(*arguments))
except EOFError:
    pass
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Channel]]:
    (tmp_path / "lightning_rft_echo.py").write_text(ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    process, channel = spawn("lightning_rft_echo", environment={"OURS": "yes"}, log=tmp_path / "log", own_session=True)
    yield process, channel
    channel.close()
    assert process.wait(10) == 0  # by end of file
    assert (tmp_path / "log").read_text() == "hello from the child\n"


def test_a_child(child: tuple[Any, Channel]) -> None:
    process, channel = child

    def ask(*call: Any) -> Any:
        channel.send(call)
        return channel.receive(30)

    secret = 41
    assert ask(lambda number: number + secret, 1) == 42  # a lambda with a closure: by value
    environment = ask(lambda: dict(os.environ))
    assert not {"WORLD_SIZE", "MASTER_ADDR"} & environment.keys()
    assert environment["OURS"] == "yes"
    assert ask(os.getcwd) == os.getcwd()
    assert ask(os.getsid, 0) == process.pid


def test_what_a_killed_child_leaves_is_end_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lightning_rft_echo.py").write_text(ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    process, channel = spawn("lightning_rft_echo", log=tmp_path / "log")
    until((tmp_path / "log").read_text, "the child's greeting")
    process.send_signal(signal.SIGKILL)
    with pytest.raises((EOFError, ConnectionResetError)):
        channel.receive(30)
    process.wait(10)
    channel.close()
