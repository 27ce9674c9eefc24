"""The task that Ray runs for a place: it dials in from its node, as ``lightning-rft join`` does."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from lightning_rft.explorer.join import take_place
from lightning_rft.explorer.log_tail import log_tail

__all__ = ["explore"]

_WAIT_S = 30.0  # the trainer listens already


def explore(slot: int, address: str, secret: bytes) -> tuple[str, str]:
    """Runs the explorer of a place until it ends; how it ended, and the end of its output."""
    log = _output()
    status = take_place(slot, address, secret, _WAIT_S, log)
    how = "had no place to take" if status is None else f"ended with status {status}"
    if log is None:
        return how, ""
    with contextlib.suppress(OSError):
        return how, f"the end of {log} on {socket.gethostname()}:\n{log_tail(log)}"
    return how, ""


def _output() -> Path | None:
    """The file in which Ray keeps the output of this process; ``None`` if it is another kind of thing, or not known."""
    path = Path(os.path.realpath("/proc/self/fd/1"))
    return path if path.is_file() else None
