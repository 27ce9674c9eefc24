"""The port at which explorers dial in: nothing that strangers send is unpickled, and they keep nobody else out."""

from __future__ import annotations

import pickle
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rft import authentication
from lightning_rft.authentication import prove
from lightning_rft.errors import AuthenticationError
from lightning_rft.explorer.about import CLAIM_SIZE, About
from lightning_rft.explorer.reception import Guest, Reception
from tests.bombs import Bomb, framed
from tests.processes import until

SECRET, OTHER = b"5" * 64, b"6" * 64
OPENING_SIZE = len(authentication._Caller().opening)
GREETING_SIZE = 32 + CLAIM_SIZE + 32  # nonce, claim, proof
REFUSED = bytes(32)


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Reception, int]]:
    monkeypatch.setattr(authentication, "_PATIENCE_S", 0.5)
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    listening = Reception(server, SECRET, silence_s=60)
    yield listening, port
    listening.close()
    with pytest.raises(ConnectionRefusedError):
        dial(port)


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 5)


def come(port: int, secret: bytes = SECRET) -> socket.socket:
    """An explorer that knows a secret."""
    line = dial(port)
    try:
        prove(line, secret, About.this().claim(), 5)
    except BaseException:
        line.close()
        raise
    return line


def taken(listening: Reception) -> Guest:
    return until(lambda: listening.take(0), "a guest", timeout_s=5)


def rest(line: socket.socket) -> bytes:
    """All that the other side still says."""
    line.settimeout(5)
    said = b""
    try:
        while part := line.recv(4096):
            said += part
    except ConnectionResetError:
        pass
    return said


def greeting(opening: bytes, secret: bytes = SECRET) -> bytes:
    """What an explorer with a secret says."""
    shown = bytes(32) + About.this().claim()
    return shown + authentication._proof(secret, b"comes", opening + shown)


def test_who_knows_the_secret_is_let_in(listening: tuple[Reception, int]) -> None:
    room, port = listening
    assert room.take(0) is None
    with come(port) as line:
        guest = taken(room)
        assert guest.about == About.this() and guest.about.refusal() == ""
        guest.line.setblocking(True)
        with guest.line:
            line.sendall(b"hello")
            assert guest.line.recv(5) == b"hello"
    assert room.take(0) is None


def test_a_guest_that_leaves_takes_no_place(listening: tuple[Reception, int]) -> None:
    room, port = listening
    come(port).close()
    with come(port):
        until(lambda: len(room._guests) == 1, "the end of the one that has left", timeout_s=5)
        taken(room).line.close()


def test_another_secret_is_refused_and_the_reason_said(
    listening: tuple[Reception, int], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        with pytest.raises(AuthenticationError, match="does not take this secret"):
            come(listening[1], OTHER)
    assert caplog.text.count("refused 127.0.0.1, which does not know the secret") == 1
    assert SECRET.decode() not in caplog.text and OTHER.decode() not in caplog.text


def test_an_explorer_does_not_obey_who_has_another_secret() -> None:
    def pretend(say: Callable[[socket.socket], None], match: str) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            say(theirs)
            with pytest.raises(AuthenticationError, match=match):
                prove(ours, SECRET, About.this().claim(), 5)

    opening = authentication._Caller().opening
    pretend(lambda line: line.sendall(opening + b"\1" * 32), "does not know this run's secret")
    pretend(lambda line: line.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 3), "no trainer of lightning_rft")


def test_one_sides_proof_is_none_for_the_other(listening: tuple[Reception, int]) -> None:
    room, port = listening

    def answer(said: Callable[[bytes], bytes]) -> bytes:
        with dial(port) as line:
            line.sendall(said(line.recv(OPENING_SIZE, socket.MSG_WAITALL)))
            return line.recv(32, socket.MSG_WAITALL)

    with dial(port) as line:
        opening = line.recv(OPENING_SIZE, socket.MSG_WAITALL)
        overheard = greeting(opening)
        line.sendall(overheard)
        proof = line.recv(32, socket.MSG_WAITALL)
        assert len(proof) == 32 and proof != REFUSED
        taken(room).line.close()
    assert answer(lambda _: overheard) == REFUSED
    assert answer(lambda opening: greeting(opening)[:-32] + proof) == REFUSED

    def mirrored(opening: bytes) -> bytes:
        """With what the trainer would prove itself by, in place of an explorer's proof."""
        shown = greeting(opening)[:-32]
        return shown + authentication._proof(SECRET, b"listens", opening + shown)

    assert answer(mirrored) == REFUSED
    assert answer(lambda opening: greeting(opening, OTHER)) == REFUSED


def test_an_explorer_waits_for_nobody_for_ever() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(authentication._Caller().opening[:-1])
        with pytest.raises(TimeoutError):
            prove(ours, SECRET, About.this().claim(), 0.1)


def test_who_says_too_little_is_sent_away(listening: tuple[Reception, int]) -> None:
    with dial(listening[1]) as silent, dial(listening[1]) as slow:
        slow.sendall(b"x" * (GREETING_SIZE - 1))
        began = time.monotonic()
        assert len(rest(silent)) == len(rest(slow)) == OPENING_SIZE
        assert time.monotonic() - began < 3


def test_many_who_say_nothing_keep_nobody_out(
    listening: tuple[Reception, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authentication, "_PATIENCE_S", 60)
    room, port = listening
    silent = [dial(port) for _ in range(3 * authentication._MOST)]
    with come(port):
        assert len(room._gate._callers) <= authentication._MOST
        taken(room).line.close()
    for line in silent:
        line.close()


# The fuzz


# What a stranger says, given what the trainer has said, an explorer's greeting from before, and a bomb.
Says = Callable[[bytes, bytes, bytes], bytes]
SAYS = st.one_of(
    st.binary(max_size=2 * GREETING_SIZE).map(lambda data: lambda opening, heard, bomb: data),
    st.integers(0, 8 * GREETING_SIZE - 1).map(lambda bit: lambda opening, heard, bomb: flipped(greeting(opening), bit)),
    st.integers(0, GREETING_SIZE - 1).map(lambda size: lambda opening, heard, bomb: greeting(opening)[:size]),
    st.sampled_from(
        [
            lambda opening, heard, bomb: heard,
            lambda opening, heard, bomb: greeting(opening, OTHER),
            lambda opening, heard, bomb: greeting(opening, b""),
            lambda opening, heard, bomb: opening * 10,
            lambda opening, heard, bomb: framed(bomb) + bytes(GREETING_SIZE),
            lambda opening, heard, bomb: framed(bomb).ljust(GREETING_SIZE),
            lambda opening, heard, bomb: bomb.ljust(GREETING_SIZE) + framed(bomb),
            lambda opening, heard, bomb: greeting(opening, OTHER) + framed(bomb),
            lambda opening, heard, bomb: struct.pack("!i", -1) + struct.pack("!Q", 2**62) + bomb,
            lambda opening, heard, bomb: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ]
    ),
)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(strangers=st.lists(SAYS, min_size=1, max_size=4))
def test_nothing_of_a_strangers_is_unpickled(
    listening: tuple[Reception, int], tmp_path: Path, strangers: list[Says]
) -> None:
    room, port = listening
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    with come(port) as line, taken(room).line:
        heard = greeting(bytes(OPENING_SIZE))
        lines = [dial(port) for _ in strangers]
        for stranger, says in zip(lines, strangers, strict=True):
            opening = stranger.recv(OPENING_SIZE, socket.MSG_WAITALL)
            said = says(opening, heard, bomb)
            stranger.sendall(said)
            if len(said) >= GREETING_SIZE:
                assert rest(stranger) in (REFUSED, b"")
        with come(port):  # while others are still in the middle of what they say
            taken(room).line.close()
        assert room.take(0) is None
        for stranger in lines:
            stranger.close()
        line.sendall(b"still there")
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()
