"""The greeting of an explorer that dials in: both sides prove that they know the run's secret, before anything else.

::

    trainer    HELLO, nonce
    explorer   nonce, about itself, HMAC(secret, "explorer", all of the above)
    trainer    HMAC(secret, "trainer", all of the above)

Three passes, as in ISO/IEC 9798-4. Each has a fixed size, so that what a stranger sends is neither measured, parsed nor
unpickled: it is compared, and that is all. Nonces make what was overheard worthless, and the two names keep one side's
proof from being used for the other's. What follows is not encrypted.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import sys
import time
from dataclasses import asdict, dataclass

import lightning_rft
from lightning_rft.errors import ConfigurationError

__all__ = ["GREETING_SIZE", "REFUSED", "About", "Challenge", "greet", "keep_alive"]

_HELLO = b"lightning-rft/1\n"
_NONCE, _PROOF = 32, 32
_ABOUT = 256
#: Bytes that an explorer sends, and what the trainer sends in place of its proof to one that does not know the secret.
GREETING_SIZE = _NONCE + _ABOUT + _PROOF
REFUSED = bytes(_PROOF)
_PROBES = 4


@dataclass(frozen=True)
class About:
    """What an explorer says of itself."""

    host: str
    pid: int
    #: What both sides must have in common, since functions travel between them as compiled code.
    python: str
    version: str

    @classmethod
    def this(cls) -> About:
        """This process."""
        python = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
        return cls(socket.gethostname()[:64], os.getpid(), python, lightning_rft.__version__)

    def refusal(self) -> str:
        """Why such an explorer cannot work for this process; empty if it can."""
        ours = About.this()
        if (self.python, self.version) == (ours.python, ours.version):
            return ""
        return (
            f"the trainer has {ours.python} and lightning_rft {ours.version}, but {self.host} has {self.python} and "
            f"lightning_rft {self.version}: install the same there"
        )


class Challenge:
    """The trainer's side, for one connection; knows no socket."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        #: What to send first.
        self.opening = _HELLO + secrets.token_bytes(_NONCE)

    def answer(self, greeting: bytes) -> tuple[bytes, About] | None:
        """The last message and who greets; ``None`` for one who does not know the secret."""
        said, proof = greeting[:-_PROOF], greeting[-_PROOF:]
        if len(greeting) != GREETING_SIZE or not hmac.compare_digest(
            proof, _proof(self._secret, b"explorer", self.opening + said)
        ):
            return None
        about = About(**json.loads(said[_NONCE:]))
        return _proof(self._secret, b"trainer", self.opening + greeting), about


def greet(line: socket.socket, secret: bytes, deadline: float) -> None:
    """The explorer's side; returns once both have proved that they know the secret.

    Raises:
        ConfigurationError: The other side is no trainer, or has another secret.
        OSError: The connection broke off, or the deadline (of :func:`time.monotonic`) has passed.
    """
    opening = _read(line, len(_HELLO) + _NONCE, deadline)
    if not opening.startswith(_HELLO):
        raise ConfigurationError("what listens there is no trainer of lightning_rft, or another version of it")
    said = secrets.token_bytes(_NONCE) + json.dumps(asdict(About.this())).encode("ascii").ljust(_ABOUT)
    greeting = said + _proof(secret, b"explorer", opening + said)
    assert len(greeting) == GREETING_SIZE, "what an explorer says of itself is too long"
    line.sendall(greeting)
    proof = _read(line, _PROOF, deadline)
    if proof == REFUSED:
        raise ConfigurationError("the trainer there does not take this secret: it is another run's")
    if not hmac.compare_digest(proof, _proof(secret, b"trainer", opening + greeting)):
        raise ConfigurationError("what listens there does not know this run's secret, and is not obeyed")


def keep_alive(line: socket.socket, silence_s: float) -> None:
    """Has the system end a connection whose other side has not answered it for so long, whether or not anyone sends."""
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, round(silence_s / (_PROBES + 1)))
    for name, value in {
        "TCP_KEEPIDLE": every,
        "TCP_KEEPALIVE": every,  # what macOS calls it
        "TCP_KEEPINTVL": every,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": round(1000 * silence_s),  # Linux: also while something is under way
    }.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _proof(secret: bytes, side: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, side + b"\0" + said, "sha256")


def _read(line: socket.socket, size: int, deadline: float) -> bytes:
    """Exactly so many bytes; ``ConnectionError`` if the other side hangs up before."""
    data = b""
    while len(data) < size:
        line.settimeout(max(0.01, deadline - time.monotonic()))
        part = line.recv(size - len(data))
        if not part:
            raise ConnectionError("the other side has hung up")
        data += part
        if time.monotonic() > deadline and len(data) < size:
            raise TimeoutError("the other side says too little")
    return data
