"""Connections whose two ends prove to each other that they know a secret, before either reads anything else.

::

    who listens   HELLO, nonce
    who comes     nonce, claim, HMAC(secret, "comes", all of the above)
    who listens   HMAC(secret, "listens", all of the above)

Three passes, as in ISO/IEC 9798-4. Each has a fixed size, so that what a stranger sends is neither measured, parsed nor
unpickled: it is compared, and that is all. Nonces make what was overheard worthless, and the two names keep one side's
proof from being used for the other's. What travels later is neither encrypted nor signed.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from lightning_rft.errors import AuthenticationError

__all__ = ["Gate", "prove"]

_log = logging.getLogger(__name__)

_HELLO = b"lightning-rft/1\n"
_NONCE, _PROOF = 32, 32
_REFUSED = bytes(_PROOF)  # in place of a proof, to one that does not know the secret
_PATIENCE_S = 5.0  # with one that has connected; who knows the secret needs a round trip
_MOST = 64  # that have connected and proven nothing; one more, and the first of them has to go
_PAUSE_S = 0.1


@dataclass
class _Caller:
    """One that has connected and proven nothing yet."""

    opening: bytes = field(default_factory=lambda: _HELLO + secrets.token_bytes(_NONCE))
    deadline: float = field(default_factory=lambda: time.monotonic() + _PATIENCE_S)
    said: bytes = b""


class Gate:
    """Admits those who know a secret, however many strangers connect, hang up or say nothing.

    It owns the socket that listens, and the connections of those whom it has not admitted. Callers say ``claim_size``
    bytes of themselves.
    """

    def __init__(self, server: socket.socket, secret: bytes, claim_size: int) -> None:
        self._server = server
        self._secret = secret
        self._said_size = _NONCE + claim_size + _PROOF
        self._callers: dict[socket.socket, _Caller] = {}  # the first to come first
        self._warned = False
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def admit(self, timeout_s: float) -> tuple[bytes, socket.socket]:
        """Waits for the next that knows the secret; returns its claim and its connection, which is then the caller's.

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
                elif line in self._callers and (claim := self._hear(line)) is not None:
                    return claim, line

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
            time.sleep(_PAUSE_S)  # in which case the selector would tell at once again
            return
        if len(self._callers) == _MOST:
            self._turn_away(next(iter(self._callers)))
        line.setblocking(False)
        caller = self._callers[line] = _Caller()
        self._selector.register(line, selectors.EVENT_READ)
        self._say(line, caller.opening)

    def _hear(self, line: socket.socket) -> bytes | None:
        """Takes in what has come; the claim of one that has proven to know the secret, and has got the answer."""
        caller = self._callers[line]
        try:
            said = line.recv(self._said_size - len(caller.said))
        except BlockingIOError:  # told of in vain
            return None
        except OSError:
            said = b""
        caller.said += said
        if not said:
            self._turn_away(line)
        if not said or len(caller.said) < self._said_size:
            return None
        shown, proof = caller.said[:-_PROOF], caller.said[-_PROOF:]
        if not hmac.compare_digest(proof, _proof(self._secret, b"comes", caller.opening + shown)):
            self._refuse(line)
            return None
        if not self._say(line, _proof(self._secret, b"listens", caller.opening + caller.said)):
            self._turn_away(line)
            return None
        self._forget(line)
        line.setblocking(True)
        return shown[_NONCE:]

    def _refuse(self, line: socket.socket) -> None:
        if not self._warned:  # once, since who has no secret decides how often this happens
            self._warned = True
            _log.warning("refused %s, which does not know the secret of this run", _peer(line))
        self._say(line, _REFUSED)
        self._turn_away(line)

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


def prove(line: socket.socket, secret: bytes, claim: bytes, timeout_s: float) -> None:
    """Proves to a :class:`Gate` that this end knows its secret, with a claim; returns once the other end has, too.

    Raises:
        AuthenticationError: What listens there has another secret, or is something else.
        TimeoutError: It said nothing in time.
        OSError: The connection broke off.
    """
    deadline = time.monotonic() + timeout_s
    opening = _read(line, len(_HELLO) + _NONCE, deadline)
    if not opening.startswith(_HELLO):
        raise AuthenticationError("what listens there is no trainer of lightning_rft, or another version of it")
    shown = secrets.token_bytes(_NONCE) + claim
    said = shown + _proof(secret, b"comes", opening + shown)
    line.sendall(said)
    proof = _read(line, _PROOF, deadline)
    if proof == _REFUSED:
        raise AuthenticationError("the trainer there does not take this secret: it is another run's")
    if not hmac.compare_digest(proof, _proof(secret, b"listens", opening + said)):
        raise AuthenticationError("what listens there does not know this run's secret, and is not obeyed")


def _proof(secret: bytes, who: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, who + b"\0" + said, "sha256")


def _read(line: socket.socket, size: int, deadline: float) -> bytes:
    found = b""
    while len(found) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the other end says too little")
        line.settimeout(left)
        more = line.recv(size - len(found))
        if not more:
            raise ConnectionResetError("the other end hung up before it proved to know the secret")
        found += more
    return found


def _peer(line: socket.socket) -> Any:
    try:
        return line.getpeername()[0]
    except OSError:  # it has just hung up
        return "a stranger"
