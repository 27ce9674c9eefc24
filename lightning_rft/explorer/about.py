"""What an explorer that dials in says of itself, and whether it can work for this trainer."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from typing import Self

import lightning_rft

__all__ = ["CLAIM_SIZE", "About"]

#: Bytes of :meth:`About.claim`.
CLAIM_SIZE = 256


@dataclass(frozen=True)
class About:
    """What an explorer says of itself."""

    host: str
    pid: int
    #: What both sides must have in common, since functions travel between them as compiled code.
    python: str
    version: str
    #: The place that it was started for; None: it takes any.
    slot: int | None = None

    @classmethod
    def this(cls, slot: int | None = None) -> Self:
        """This process."""
        python = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
        return cls(socket.gethostname()[:64], os.getpid(), python, lightning_rft.__version__, slot)

    @classmethod
    def claimed(cls, claim: bytes) -> Self:
        """What a :meth:`claim` says, of one that has proved to know the run's secret."""
        return cls(**json.loads(claim))

    def claim(self) -> bytes:
        """The same as bytes, always as many."""
        claim = json.dumps(asdict(self)).encode("ascii").ljust(CLAIM_SIZE)
        assert len(claim) == CLAIM_SIZE, "what an explorer says of itself is too long"
        return claim

    def refusal(self) -> str:
        """Why such an explorer cannot work for this process; empty if it can."""
        ours = About.this()
        if (self.python, self.version) == (ours.python, ours.version):
            return ""
        return (
            f"the trainer has {ours.python} and lightning_rft {ours.version}, but {self.host} has {self.python} and "
            f"lightning_rft {self.version}: install the same there"
        )
