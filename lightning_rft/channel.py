"""Channels between processes: pickled messages over a socket pair, each end closed by the death of its process."""

from __future__ import annotations

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

from lightning_rft.errors import ConfigurationError, ExplorerError, RFTError
from lightning_rft.pickling import dumps

__all__ = ["Channel", "Failure", "spawn", "unpack"]


_SEND_DEADLINE_S = 20


# Left in place, an explorer would take itself for a rank of the trainer's process group.
_DISTRIBUTED = {
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
}


@dataclass(frozen=True)
class Failure:
    """An exception on its way to another process: itself where it can be pickled, and its traceback as text.

    ``permanent`` says that trying again would change nothing.
    """

    exception: bytes | None
    text: str
    permanent: bool = False

    @classmethod
    def of(cls, exception: BaseException) -> Failure:
        """Packs an exception."""
        text = "".join(traceback.format_exception(exception))
        permanent = isinstance(exception, ConfigurationError)
        try:
            return cls(dumps(exception, source=False), text, permanent)
        except Exception:  # whatever a user's class raises here, the text still tells what happened
            return cls(None, text, permanent)

    def unpack(self, where: str, kind: type[RFTError] = ExplorerError) -> BaseException:
        """The original exception, its traceback in the other process as the cause.

        Args:
            where: Where it happened, such as ``"explorer 0"``.
            kind: What the cause is, and the exception itself where it cannot be made again here.
        """
        cause = kind(f"in {where}:\n{self.text}")
        if self.exception is None:
            return cause
        try:
            exception: BaseException = pickle.loads(self.exception)
        except Exception:  # some exceptions pickle but cannot be made again
            return cause
        exception.__cause__ = cause
        return exception


class Channel:
    """One end of the line. Sending is safe from several threads and gives up after some seconds."""

    def __init__(self, fd: int) -> None:
        with socket.socket(fileno=os.dup(fd)) as line:
            # A peer that was stopped reads nothing: without this a full buffer would block the sender for ever.
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_DEADLINE_S, 0))
        self._connection: Connection = Connection(fd)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """For ``multiprocessing.connection.wait``."""
        return self._connection.fileno()

    def send(self, message: Any) -> None:
        """Sends any object; functions and lambdas defined in a script or notebook travel by value."""
        packed = dumps(message)
        with self._lock:
            self._connection.send_bytes(packed)

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message.

        Raises:
            EOFError: The other side is gone.
            TimeoutError: Nothing came within ``timeout_s``.
            UnpicklingError: What came cannot be rebuilt in this process.
        """
        return unpack(self.receive_packed(timeout_s))

    def receive_packed(self, timeout_s: float | None = None) -> bytes:
        """The next message, to be rebuilt by :func:`unpack`; raises as :meth:`receive` does, but for the last."""
        if not self._connection.poll(timeout_s):
            raise TimeoutError(f"no message within {timeout_s} s")
        return self._connection.recv_bytes()

    def close(self) -> None:
        """Closes this end; the other side reads end of file."""
        self._connection.close()


def unpack(packed: bytes) -> Any:
    """Rebuilds a message, importing what it refers to: a reward's module, for example, and all that this imports.

    Raises:
        UnpicklingError: It cannot be rebuilt in this process.
    """
    try:
        return pickle.loads(packed)
    except Exception as error:  # of a user's class; an OSError among them must not pass for a broken line
        raise pickle.UnpicklingError(f"an object cannot be rebuilt in another process: {error!r}") from error


def spawn(
    module: str, *, environment: Mapping[str, str] | None = None, log: Path | None = None, own_session: bool = False
) -> tuple[subprocess.Popen[bytes], Channel]:
    """Starts ``python -m module FD`` with this process's import path and working directory.

    Args:
        module: The module to run; the file descriptor of its end of the line is its one argument.
        environment: Variables to add to this process's own.
        log: File that takes its output; left out, it shares this process's.
        own_session: Whether it leads a session and process group of its own, out of reach of a terminal's Ctrl-C.
    """
    ours, theirs = socket.socketpair()
    variables = {name: value for name, value in os.environ.items() if name not in _DISTRIBUTED}
    variables["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    variables.update(environment or {})
    with theirs:
        command = [sys.executable, "-m", module, str(theirs.fileno())]
        output = open(log, "ab") if log is not None else None  # noqa: SIM115 (closed below, on every path)
        try:
            process = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                pass_fds=[theirs.fileno()],
                start_new_session=own_session,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            if output is not None:
                output.close()
    return process, Channel(ours.detach())
