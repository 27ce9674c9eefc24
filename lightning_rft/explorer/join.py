"""The command ``lightning-rft join``: an explorer for a run on another machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_rft.authentication import prove
from lightning_rft.channel import Channel, Failure, start, unpack
from lightning_rft.errors import ConfigurationError, DeadlineError, RFTError
from lightning_rft.explorer.about import About
from lightning_rft.explorer.entrance import Admission, host_and_port
from lightning_rft.explorer.messages import Failed
from lightning_rft.explorer.secret import VARIABLE, read_secret
from lightning_rft.network import keep_alive

__all__ = ["join", "main", "take_place"]

_RETRY_S = 1.0
_GREETING_S = 10.0
_SILENCE_S = 60.0  # until the trainer has said how long a connection may be cut


def main(args: Sequence[str]) -> None:
    """Joins a run, until it is over.

    Raises:
        SystemExit: With status 1, after a message, if there was no run to join.
    """
    parser = argparse.ArgumentParser(
        "lightning-rft join",
        description="Run an explorer for a trainer on another machine, whose ExplorerPool has launcher=DialIn(...).",
    )
    parser.add_argument("address", metavar="HOST:PORT", help="where the trainer listens: it says so when it begins")
    parser.add_argument(
        "--secret-file",
        metavar="FILE",
        help=f"the run's secret, in the file that the trainer names; - for the standard input. {VARIABLE} goes before",
    )
    parser.add_argument(
        "--wait", type=float, default=600.0, metavar="SECONDS", help="how long to dial until the trainer answers (600)"
    )
    parser.add_argument(
        "--again",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long to dial once the explorer has ended: it joins as a new one unless the run is over (30)",
    )
    given = parser.parse_args(args)
    try:
        join(given.address, read_secret(given.secret_file), given.wait, given.again)
    except RFTError as error:
        raise SystemExit(f"lightning-rft join: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def join(address: str, secret: bytes, wait_s: float, again_s: float) -> None:
    """Runs one explorer after another, until nobody has answered for ``again_s``.

    Raises:
        ConfigurationError: What listens there is no trainer, has another secret, or cannot use this process.
        DeadlineError: Nobody answered for ``wait_s``, or ended the connection before there was a place.
    """
    joined, patience_s = False, wait_s
    while (line := _dial(address, secret, patience_s)) is not None:
        with line:
            joined |= _explore(line) is not None
        patience_s = again_s
        if again_s <= 0:
            break
        time.sleep(_RETRY_S)
    if not joined:
        raise DeadlineError(f"no trainer had a place at {address} within {wait_s:g} seconds: start it, or raise --wait")


def take_place(slot: int, address: str, secret: bytes, wait_s: float, log: Path | None) -> int | None:
    """Runs the explorer of a place, once; its exit status, or ``None`` if the run was over before it began.

    Raises:
        ConfigurationError: As :func:`join`.
        DeadlineError: Nobody answered for ``wait_s``.
    """
    line = _dial(address, secret, wait_s, slot)
    if line is None:
        raise DeadlineError(
            f"{socket.gethostname()} did not reach the trainer at {address} within {wait_s:g} seconds: set "
            "RayLauncher(bind=...) to an address and port of the trainer's machine that all nodes reach"
        )
    with line:
        return _explore(line, log)


def _dial(address: str, secret: bytes, wait_s: float, slot: int | None = None) -> socket.socket | None:
    """A connection over which both sides have proved that they know the secret; ``None`` after the deadline."""
    host, port = host_and_port(address, "{!r}")
    os.environ.pop(VARIABLE, None)  # no business of the explorer's, which runs anybody's rewards
    deadline = time.monotonic() + wait_s
    while True:
        # it may not listen yet, its name may not be known yet, and it may go away at any time
        with contextlib.suppress(OSError), contextlib.ExitStack() as ends:
            line = ends.enter_context(socket.create_connection((host, port), _GREETING_S))
            prove(line, secret, About.this(slot).claim(), _GREETING_S)
            line.settimeout(None)
            keep_alive(line, _SILENCE_S)
            ends.pop_all()
            return line
        if time.monotonic() > deadline:
            return None
        time.sleep(_RETRY_S)


def _explore(line: socket.socket, log: Path | None = None) -> int | None:
    """Waits for a place and runs an explorer there until it ends; its exit status, or ``None`` if there was none."""
    with contextlib.closing(Channel(os.dup(line.fileno()), patient=True)) as channel:
        try:
            packed = channel.receive_packed()
        except (EOFError, OSError):  # the run is over
            return None
        try:
            admission: Admission = unpack(packed)
            place = admission.place
            environment = {} if place is None else place.environment()
        except Exception as error:  # of the user's engine: rank 0 raises it
            channel.send(Failed(Failure.of(error)))
            raise
    if place is None:
        raise ConfigurationError(admission.refusal)
    keep_alive(line, admission.silence_s)
    print(f"exploring at place {place.slot}", flush=True)  # noqa: T201
    process = start(
        "lightning_rft.explorer.worker.main", line.fileno(), environment=environment, log=log, own_session=True
    )
    line.close()  # so that its end is the explorer's
    try:
        return process.wait()
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills an explorer and everything it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
