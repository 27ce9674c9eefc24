"""How rank 0 and an explorer talk: pickled messages over a socket pair, each side's end closed by its death."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lightning_rft.errors import ConfigurationError, ExplorerError, RFTError
from lightning_rft.experience import Experience, GroupKey, Task, TensorInfo
from lightning_rft.pickling import dumps

__all__ = [
    *("Advanced", "Cancel", "Channel", "Connect", "Explore", "Explored", "Failed", "Failure", "Load", "LoadFailed"),
    *("Loaded", "Prepare", "Several", "Started", "spawn", "unpack"),
]

_SEND_DEADLINE_S = 20
# Left in place, an explorer would take itself for a rank of the trainer's process group.
_DISTRIBUTED = {
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
}


@dataclass(frozen=True)
class Prepare:
    """To an explorer, first of all: import what this engine needs."""

    engine: Any


@dataclass(frozen=True)
class Explore:
    """To an explorer: run every sample of a group.

    Args:
        run: Which run asks; answers carry it, so that late ones of an earlier run are recognised.
        key: Where the group belongs.
        attempt: Counts how often the group was issued; an answer to an earlier attempt is recognised by it.
        task: What to answer.
        seeds: One for each sample; there are as many samples as seeds.
        temperature: Softmax temperature, 0 for greedy.
    """

    run: int
    key: GroupKey
    attempt: int
    task: Task
    seeds: tuple[int, ...]
    temperature: float


@dataclass(frozen=True)
class Cancel:
    """To an explorer: forget one group of ``run``, or with ``key`` ``None`` all its work."""

    run: int
    key: GroupKey | None = None


@dataclass(frozen=True)
class Several:
    """To an explorer: these messages, in order, and no engine step between them."""

    messages: tuple[Any, ...]


@dataclass(frozen=True)
class Connect:
    """To an explorer: join a weight transport."""

    link: Any


@dataclass(frozen=True)
class Load:
    """To an explorer: receive ``version``."""

    manifest: Sequence[TensorInfo]
    version: int


@dataclass(frozen=True)
class Started:
    """From an explorer: the engine is ready."""

    dtype: str
    world_size: int
    nccl: bool
    max_num_seqs: int


@dataclass(frozen=True)
class Loaded:
    """From an explorer: it computes with ``version`` now."""

    version: int


@dataclass(frozen=True)
class Advanced:
    """From an explorer: it has come further since the last time, by an engine step or a reward. A hung one has not."""


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


@dataclass(frozen=True)
class Explored:
    """From an explorer: a group is complete, or as complete as it will be.

    Args:
        run: The run that asked.
        key: Where the group belongs.
        attempt: Which issue of the group this answers.
        task_id: The task that was answered.
        experiences: The samples that succeeded.
        failures: Why the others did not, after every retry.
        retried: How often a sample was tried again.
    """

    run: int
    key: GroupKey
    attempt: int
    task_id: str
    experiences: tuple[Experience, ...]
    failures: tuple[Failure, ...] = ()
    retried: int = 0


@dataclass(frozen=True)
class LoadFailed:
    """From an explorer: the transport broke off; it computes nothing until the next load succeeds."""

    version: int
    failure: Failure


@dataclass(frozen=True)
class Failed:
    """From an explorer: it cannot go on, and ends."""

    failure: Failure


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
