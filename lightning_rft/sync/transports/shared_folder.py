"""Proof that explorers see the trainer's folder, and not another one of the same name on their own machine."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

from lightning_rft.errors import ConfigurationError

__all__ = ["SharedFolder"]

_FILE = ".seen-by-explorers"
_PATIENCE_S = 10.0  # network filesystems show a new file a few seconds late
_PAUSE_S = 0.1


@dataclass(frozen=True)
class SharedFolder:
    """A folder with a file in it whose contents only those know who read it, or were told by the trainer."""

    path: str
    nonce: str = field(repr=False)

    @classmethod
    def create(cls, path: Path) -> SharedFolder:
        """Makes the folder and the file, on the trainer's side."""
        path.mkdir(parents=True, exist_ok=True)
        made = cls(str(path), token_hex())
        (path / _FILE).write_text(made.nonce, encoding="ascii")
        return made

    def check(self, patience_s: float) -> None:
        """Raises :class:`ConfigurationError` unless this process sees the same file, at the latest after so long."""
        deadline = time.monotonic() + min(patience_s, _PATIENCE_S)
        while not self._seen():
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"the explorer on {socket.gethostname()} does not see the folder {self.path} that the trainer "
                    "writes checkpoints to: set CheckpointTransport(dirpath=...) to a folder on a disk that all "
                    "machines mount at the same path, or take CollectiveTransport(), which needs none"
                )
            time.sleep(_PAUSE_S)

    def remove(self) -> None:
        """Removes the file, and leaves the folder."""
        with contextlib.suppress(OSError):
            (Path(self.path) / _FILE).unlink(missing_ok=True)

    def _seen(self) -> bool:
        try:
            return (Path(self.path) / _FILE).read_bytes() == self.nonce.encode("ascii")
        except OSError:
            return False
