"""Connections whose two ends prove to each other that they know a secret, before either reads anything else.

Who listens sends a nonce; who comes answers with a nonce of its own, its number, and a keyed hash (HMAC-SHA256) of all
of these; the listener proves itself by another. The secret never travels, a proof is of no use on another connection,
and whatever a stranger sends, a fixed number of bytes is read and compared, and nothing is unpickled. What travels
later is neither encrypted nor signed.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

__all__ = ["Gate", "prove"]

_NONCE = 32
_NUMBER = 4
_PROOF = 32
_CLAIM = _NONCE + _NUMBER + _PROOF
_PATIENCE_S = 5.0  # with one that has connected; who knows the secret needs a round trip
_MOST = 64  # that have connected and proven nothing; one more, and the first of them has to go


@dataclass
class _Caller:
    """One that has connected and proven nothing yet."""

    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(_NONCE))
    deadline: float = field(default_factory=lambda: time.monotonic() + _PATIENCE_S)
    said: bytes = b""


class Gate:
    """Admits those who know a secret, however many strangers connect, hang up or say nothing.

    It owns the socket that listens, and the connections of those whom it has not admitted.
    """

    def __init__(self, server: socket.socket, secret: bytes) -> None:
        self._server = server
        self._secret = secret
        self._callers: dict[socket.socket, _Caller] = {}  # the first to come first
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def admit(self, timeout_s: float) -> tuple[int, socket.socket]:
        """Waits for the next that knows the secret; returns its number and its connection, which is then the caller's.

        Raises:
            TimeoutError: Nobody came in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            for late in [line for line, caller in self._callers.items() if now > caller.deadline]:
                self._turn_away(late)
            if now > deadline:
                raise TimeoutError(f"nobody who knows the secret came within {timeout_s:g} s")
            ends = min([deadline, *(caller.deadline for caller in self._callers.values())])
            for key, _ in self._selector.select(ends - now):
                line = key.fileobj
                assert isinstance(line, socket.socket)
                if line is self._server:
                    self._accept()
                elif line in self._callers and (number := self._hear(line)) is not None:
                    return number, line

    def close(self) -> None:
        """Listens no more, and turns away those who wait; safe to call twice."""
        for line in list(self._callers):
            self._turn_away(line)
        self._selector.close()
        self._server.close()

    def _accept(self) -> None:
        try:
            line, _ = self._server.accept()
        except OSError:  # it has hung up already, or this process has no descriptor left for it
            return
        if len(self._callers) == _MOST:
            self._turn_away(next(iter(self._callers)))
        line.setblocking(False)
        caller = self._callers[line] = _Caller()
        self._selector.register(line, selectors.EVENT_READ)
        self._say(line, caller.nonce)

    def _hear(self, line: socket.socket) -> int | None:
        """Takes in what has come; its number once it has proven to know the secret, and has got the answer."""
        caller = self._callers[line]
        try:
            said = line.recv(_CLAIM - len(caller.said))
        except OSError:
            said = b""
        caller.said += said
        if not said:
            self._turn_away(line)
        if not said or len(caller.said) < _CLAIM:
            return None
        shown, proof = caller.said[:-_PROOF], caller.said[-_PROOF:]
        known = hmac.compare_digest(proof, _hash(self._secret, b"comes", caller.nonce, shown))
        if not (known and self._say(line, _hash(self._secret, b"listens", caller.nonce, shown))):
            self._turn_away(line)
            return None
        self._forget(line)
        line.setblocking(True)
        return int.from_bytes(shown[_NONCE:], "big")

    def _say(self, line: socket.socket, words: bytes) -> bool:
        """Whether it could be said: a new connection has room for far more than this."""
        try:
            return line.send(words) == len(words)
        except OSError:  # it has hung up, which the selector will tell
            return False

    def _turn_away(self, line: socket.socket) -> None:
        self._forget(line)
        line.close()

    def _forget(self, line: socket.socket) -> None:
        del self._callers[line]
        self._selector.unregister(line)


def prove(line: socket.socket, secret: bytes, number: int, timeout_s: float) -> bool:
    """Proves to a :class:`Gate` that this end knows its secret, under a number; whether the other end knows it too.

    Raises:
        TimeoutError: The other end said nothing in time.
        OSError: It hung up, as a gate does to one that does not know the secret.
    """
    deadline = time.monotonic() + timeout_s
    nonce = _read(line, _NONCE, deadline)
    shown = secrets.token_bytes(_NONCE) + number.to_bytes(_NUMBER, "big")
    line.sendall(shown + _hash(secret, b"comes", nonce, shown))
    return hmac.compare_digest(_read(line, _PROOF, deadline), _hash(secret, b"listens", nonce, shown))


def _read(line: socket.socket, size: int, deadline: float) -> bytes:
    found = b""
    while len(found) < size:
        line.settimeout(max(0.001, deadline - time.monotonic()))
        more = line.recv(size - len(found))
        if not more:
            raise ConnectionResetError("the other end hung up before it proved to know the secret")
        found += more
    return found


def _hash(secret: bytes, who: bytes, nonce: bytes, shown: bytes) -> bytes:
    return hmac.digest(secret, who + nonce + shown, "sha256")
