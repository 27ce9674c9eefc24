"""Channels between processes: pickled messages over a socket pair, whose end closes when its process dies."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lightning_rft.errors import ExplorerError, RFTError
from lightning_rft.pickling import dumps

__all__ = ["Channel", "Failure", "spawn", "start", "unpack"]

_SEND_DEADLINE_S = 20

# With these variables an explorer would consider itself a rank of the trainer's process group.
_DISTRIBUTED = {
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
}


@dataclass(frozen=True)
class Failure:
    """An exception for another process: pickled where that is possible, and its traceback as text."""

    exception: bytes | None
    text: str

    @property
    def place(self) -> str:
        """Where it was raised: the last file and line of its traceback."""
        return next((line for line in reversed(self.text.splitlines()) if line.startswith('  File "')), self.text)

    @classmethod
    def of(cls, exception: BaseException) -> Failure:
        """Packs an exception."""
        # a user's message may hold what no file or database takes
        text = "".join(traceback.format_exception(exception)).encode(errors="backslashreplace").decode()
        try:
            return cls(dumps(exception, source=False), text)
        except Exception:  # a user's class may raise anything here; the text still says what happened
            return cls(None, text)

    def unpack(self, where: str, kind: type[RFTError] = ExplorerError) -> BaseException:
        """The original exception, with a ``kind`` as cause that holds its traceback and says where it was raised.

        An exception that cannot be rebuilt in this process is replaced by its cause.
        """
        cause = kind(f"in {where}:\n{self.text}")
        if self.exception is None:
            return cause
        try:
            exception = pickle.loads(self.exception)
        except Exception:  # some exceptions pickle but cannot be rebuilt
            return cause
        if not isinstance(exception, BaseException):  # or are rebuilt as something else
            return cause
        exception.__cause__ = cause
        return exception


class Channel:
    """One end of a channel; several threads may send, which fails after some seconds if the other end reads nothing.

    With ``patient`` it waits instead, for a sender that ends with the other side. A message that began and does not go
    on for ``silence_s`` is an ``OSError`` to its receiver, who else waits for ever.
    """

    def __init__(self, fd: int, *, patient: bool = False, silence_s: float = 0.0) -> None:
        # A stopped peer reads nothing: without a limit a full buffer would block the sender for ever.
        limits = {socket.SO_SNDTIMEO: 0.0 if patient else _SEND_DEADLINE_S, socket.SO_RCVTIMEO: silence_s}
        with socket.socket(fileno=os.dup(fd)) as line:
            for limit, seconds in limits.items():
                line.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))
        self._connection: Connection = Connection(fd)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The file descriptor, for ``multiprocessing.connection.wait``."""
        return self._connection.fileno()

    def send(self, message: Any) -> None:
        """Sends any object; functions and lambdas defined in a script or notebook travel by value."""
        packed = dumps(message)
        with self._lock:
            self._connection.send_bytes(packed)

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message; raises as :meth:`receive_packed` and :func:`unpack` do."""
        return unpack(self.receive_packed(timeout_s))

    def receive_packed(self, timeout_s: float | None = None) -> bytes:
        """The next message, still pickled; raises ``EOFError`` from a dead peer, ``TimeoutError`` if nothing comes."""
        if not self._connection.poll(timeout_s):
            raise TimeoutError(f"no message within {timeout_s} s")
        return self._connection.recv_bytes()

    def close(self) -> None:
        """Closes this end; the other side reads end of file."""
        self._connection.close()


def unpack(packed: bytes) -> Any:
    """Rebuilds a message, importing the modules that it refers to; raises ``UnpicklingError`` if that fails."""
    try:
        return pickle.loads(packed)
    except Exception as error:  # of a user's class; an OSError must not pass for a broken connection
        raise pickle.UnpicklingError(f"an object cannot be rebuilt in another process: {error!r}") from error


def spawn(
    module: str, *, environment: Mapping[str, str] | None = None, log: Path | None = None, own_session: bool = False
) -> tuple[subprocess.Popen[bytes], Channel]:
    """Starts a process as :func:`start` does, at the other end of the channel that it returns, too."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = start(module, theirs.fileno(), environment=environment, log=log, own_session=own_session)
        except BaseException:
            ours.close()
            raise
    return process, Channel(ours.detach())


def start(
    module: str,
    fd: int,
    *,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    own_session: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts ``python -m module FD PID`` with the import path and working directory of this process, whose id is PID.

    FD is its channel. ``environment`` adds variables, ``log`` takes its output in place of this process's, and with
    ``own_session`` a terminal's Ctrl-C does not reach it.
    """
    variables = {name: value for name, value in os.environ.items() if name not in _DISTRIBUTED}
    variables["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    variables.update(environment or {})
    with contextlib.nullcontext() if log is None else open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(fd), str(os.getpid())],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if log is None else subprocess.STDOUT,
            pass_fds=[fd],
            start_new_session=own_session,
        )
