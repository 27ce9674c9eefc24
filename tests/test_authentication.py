"""Who does not know the secret: whatever it sends, and however many there are, nothing of it is read as a message."""

from __future__ import annotations

import os
import pickle
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lightning_rft import authentication, channel
from lightning_rft.authentication import Gate, prove
from lightning_rft.errors import ConfigurationError, DeadlineError, RankError
from lightning_rft.network import LOOPBACK, address_towards, is_loopback, listen
from lightning_rft.trainer import ranks as ranks_of_a_trainer
from lightning_rft.trainer import rendezvous
from lightning_rft.trainer.ranks import Ranks
from lightning_rft.trainer.rendezvous import gate_at, join, welcome
from tests.bombs import Bomb, framed
from tests.processes import until

SECRET = b"known to the run".ljust(32)
OPENING = len(authentication._Caller().opening)
CLAIM = 32 + 4 + 32  # bytes: nonce, number, proof
REFUSED = bytes(32)

Place = tuple[str, int]


class Recorded:
    """A connection of one that proves itself, and what it said."""

    def __init__(self, line: socket.socket) -> None:
        self.said = b""
        self.recv, self.settimeout, self._line = line.recv, line.settimeout, line

    def sendall(self, data: bytes) -> None:
        self.said += data
        self._line.sendall(data)


@pytest.fixture
def gate() -> Iterator[Gate]:
    with gate_at(listen(LOOPBACK, 128), SECRET) as gate:
        yield gate


@pytest.fixture
def place(gate: Gate) -> Place:
    return gate._server.getsockname()


@pytest.fixture
def strangers(place: Place) -> Iterator[Callable[[bytes], socket.socket]]:
    """Connects one that says something, and listens on."""
    lines: list[socket.socket] = []

    def stranger(words: bytes) -> socket.socket:
        lines.append(socket.create_connection(place, 10))
        lines[-1].sendall(words)
        return lines[-1]

    yield stranger
    for line in lines:
        line.close()


def heard(line: socket.socket) -> bytes:
    """All that is said to a stranger until it is turned away."""
    line.settimeout(20)
    found = b""
    try:
        while more := line.recv(4096):
            found += more
    except ConnectionResetError:  # it had said more than was read
        pass
    return found


def test_both_ends_know_the_secret(gate: Gate, place: Place) -> None:
    with ThreadPoolExecutor(1) as threads, socket.create_connection(place, 10) as line:
        proven = threads.submit(prove, line, SECRET, b"7777", 10.0)
        claim, admitted = gate.admit(10)
        proven.result()
        assert claim == b"7777"
        with admitted:
            line.settimeout(10)
            admitted.sendall(b"and now a message")
            assert line.recv(100) == b"and now a message"


def test_nothing_of_a_stranger_is_unpickled(
    gate: Gate, place: Place, strangers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many talk and many are silent, and the ranks of a run meet among them all the same."""
    chance, bomb, read = random.Random(0), framed(pickle.dumps(Bomb(tmp_path / "trace"))), []
    whole = pickle.loads
    monkeypatch.setattr(channel.pickle, "loads", lambda packed: read.append(packed) or whole(packed))
    lines = [strangers(chance.randbytes(chance.choice([1, 4, CLAIM - 1, CLAIM, CLAIM + 1, 300]))) for _ in range(40)]
    lines += [strangers(words) for words in (bomb, bytes(CLAIM) + bomb, chance.randbytes(CLAIM) + bomb, b"")]
    with socket.create_connection(place, 10) as line:  # hangs up with a reset
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    began = time.monotonic()
    with ThreadPoolExecutor(3) as threads:
        rank_0 = threads.submit(welcome, gate, 3)
        others = [threads.submit(join, *place, SECRET, rank) for rank in (2, 1)]
        lines += [strangers(bomb), strangers(b"")]
        peers = rank_0.result()
        joined = {rank: future.result() for rank, future in zip((2, 1), others, strict=True)}
    assert time.monotonic() - began < 4, "somebody silent was waited for"
    for rank, theirs in joined.items():
        theirs.send(f"from {rank}")
        assert peers[rank].receive(10) == f"from {rank}"
        peers[rank].send("from 0")
        assert theirs.receive(10) == "from 0"
    gate.close()
    assert {heard(line)[OPENING:] for line in lines} <= {b"", REFUSED}, "a stranger got more than a nonce"
    assert len(read) == 4 and not (tmp_path / "trace").exists()
    for line in [*peers.values(), *joined.values()]:
        line.close()


def test_a_crowd_of_the_silent_makes_room(gate: Gate, place: Place, strangers: Any) -> None:
    crowd = [strangers(b"") for _ in range(80)]
    with ThreadPoolExecutor(1) as threads:
        joined = threads.submit(join, *place, SECRET, 1)
        peers = welcome(gate, 2, timeout_s=20)
        for line in (joined.result(), peers[1]):
            line.close()
    assert len(gate._callers) <= 64
    assert len(heard(crowd[0])) == OPENING  # the first to come is the first to go


def test_what_was_overheard_is_of_no_use(gate: Gate, place: Place, strangers: Any) -> None:
    with ThreadPoolExecutor(1) as threads, socket.create_connection(place, 10) as line:
        recorded = Recorded(line)
        proven = threads.submit(prove, recorded, SECRET, bytes(4), 10.0)  # type: ignore[arg-type]
        gate.admit(10)[1].close()
        proven.result()
        assert len(recorded.said) == CLAIM
    again = strangers(recorded.said)
    with pytest.raises(TimeoutError):
        gate.admit(0.2)
    assert heard(again)[OPENING:] == REFUSED


@pytest.mark.parametrize("rank", [0, 3, 2**32 - 1])
def test_a_rank_that_there_is_not(gate: Gate, place: Place, rank: int) -> None:
    with ThreadPoolExecutor(1) as threads:
        joined = threads.submit(join, *place, SECRET, rank)
        with pytest.raises(DeadlineError, match=r"ranks \[1, 2\] did not connect to rank 0 within 0.3 s"):
            welcome(gate, 3, timeout_s=0.3)
        with pytest.raises(EOFError):
            joined.result().receive(10)


@pytest.fixture
def false_rank_0() -> Iterator[Callable[[bytes], Place]]:
    """Listens where rank 0 should, says something, and reads whatever comes."""
    server = listen(LOOPBACK, 8)
    threads: list[threading.Thread] = []

    def serve(words: bytes) -> None:
        with ExitStack() as lines:
            while True:
                try:
                    line, _ = server.accept()
                except OSError:  # shut down
                    return
                lines.enter_context(line).sendall(words)

    def start(words: bytes) -> Place:
        threads.append(threading.Thread(target=serve, args=(words,), daemon=True))
        threads[-1].start()
        return server.getsockname()

    yield start
    server.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(10)
    server.close()


@pytest.mark.parametrize(
    "words", [bytes(OPENING + 32), authentication._HELLO + bytes(32) + b"\1" * 32], ids=["no trainer", "another secret"]
)
def test_a_false_rank_0_is_not_listened_to(
    words: bytes, false_rank_0: Callable[[bytes], Place], tmp_path: Path
) -> None:
    place = false_rank_0(words + framed(pickle.dumps(Bomb(tmp_path / "trace"))))
    with pytest.raises(RankError, match=f"what answers at {place[0]}:{place[1]} is not rank 0 of this run"):
        join(*place, SECRET, 1, timeout_s=10)
    assert not (tmp_path / "trace").exists()


def test_a_rank_0_that_says_nothing_or_is_not_there(false_rank_0: Callable[[bytes], Place]) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"rank 1 did not reach rank 0 at .* within 0.3 s .*MASTER_ADDR"):
        join(*false_rank_0(b""), SECRET, 1, timeout_s=0.3)
    with listen(LOOPBACK, 1) as server:
        gone = server.getsockname()
    with pytest.raises(DeadlineError, match=r"Connection refused.*MASTER_ADDR"):
        join(*gone, SECRET, 1, timeout_s=0.3)
    assert time.monotonic() - began < 3


def test_addresses() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(ConfigurationError, match=r"nothing can listen at '192\.0\.2\.1' .*address of the trainer's"):
        listen("192.0.2.1", 1)  # of documentation, never a machine's
    found = {host: is_loopback(host) for host in ("127.0.0.1", "127.0.1.1", "::1", "localhost", "10.0.0.1", "node-1")}
    assert [host for host, here in found.items() if here] == ["127.0.0.1", "127.0.1.1", "::1", "localhost"]


def test_half_a_message_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that reads nothing for long gets no further message: it would take that for the rest of this one."""
    monkeypatch.setattr(channel, "_SEND_DEADLINE_S", 1)
    monkeypatch.setattr(ranks_of_a_trainer, "_GRACE_S", 60.0)  # this is no process to be ended
    ours, theirs = socket.socketpair()
    rank_0 = Ranks(0, 2, {1: channel.Channel(ours.detach())})
    with theirs:
        message = bytes(10_000_000)
        assert rank_0.agree("something large", lambda: message) == message
        theirs.settimeout(20)
        size = 0
        while more := theirs.recv(1 << 20):
            size += len(more)
        assert 0 < size < len(message)
        with pytest.raises(RankError, match="rank 1 is gone"):
            until(rank_0.check, "that it is noticed", timeout_s=10)  # type: ignore[func-returns-value]
    rank_0.close()


def test_a_message_that_does_not_go_on_is_waited_for_no_longer_than_silence(
    gate: Gate, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "SILENCE_S", 0.5)
    monkeypatch.setattr(ranks_of_a_trainer, "_GRACE_S", 60.0)
    with ThreadPoolExecutor(1) as threads:
        joined = threads.submit(join, *place, SECRET, 1)
        rank_0 = Ranks(0, 2, welcome(gate, 2, timeout_s=20))
    os.write(joined.result().fileno(), framed(pickle.dumps("a message"))[:-1])  # as where the line is cut
    with pytest.raises(RankError, match="rank 1 is gone"):
        until(rank_0.check, "that it is noticed", timeout_s=10)  # type: ignore[func-returns-value]
    rank_0.close()
    joined.result().close()
