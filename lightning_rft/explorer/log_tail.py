"""The end of a log, read from there: one that grew for days is read as quickly as a new one."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["log_tail"]

_LINES = 20
_BYTES = 1 << 16  # of these lines together; what is longer is cut at its beginning


def log_tail(path: Path) -> str:
    r"""Last lines of a log, without more of it than fits into 64 KiB.

    Example:
        >>> from tempfile import NamedTemporaryFile
        >>> with NamedTemporaryFile("w") as file:
        ...     _ = file.write("".join(f"line {number}\n" for number in range(10**5)))
        ...     file.flush()
        ...     log_tail(Path(file.name)).splitlines()[::19]
        ['line 99980', 'line 99999']
    """
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _BYTES))
        return "\n".join(file.read(_BYTES).decode(errors="replace").splitlines()[-_LINES:])
