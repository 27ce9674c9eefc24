"""Messages that leave a trace where they are unpickled."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self._trace,)


def framed(packed: bytes) -> bytes:
    """A pickled message as a channel sends it."""
    return struct.pack("!i", len(packed)) + packed
