"""The meeting of a group's members, at a store of rank 0's that listens until all are connected."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_rft.errors import LinkError, RFTError
from lightning_rft.sync.transports.transport import Explorers

__all__ = ["Meeting", "MeetingPlace", "link_errors"]

_HOST = "127.0.0.1"  # explorers run on this machine
_MEET_S = 0.001
_GO = "go"


class Meeting:
    """Rank 0's end.

    The making of a group cannot be broken off, so it begins when everyone has come; the end of the store frees a member
    that waits in vain for another.
    """

    def __init__(self, members: Mapping[int, int], timeout_s: float) -> None:
        self.world_size = 1 + sum(members.values())
        self._timeout = timedelta(seconds=timeout_s)
        with socket.create_server((_HOST, 0), backlog=self.world_size) as server:  # torch's own would listen everywhere
            port = server.getsockname()[1]
            self._store: TCPStore | None = TCPStore(
                _HOST,
                port,
                is_master=True,
                timeout=self._timeout,
                wait_for_workers=False,
                master_listen_fd=server.detach(),
            )
        #: Where rank 0 itself is.
        self.place = MeetingPlace(_HOST, port, 0, self.world_size, timeout_s)
        self._invited: dict[str, int] = {}  # key that a process sets when it comes -> explorer
        #: The explorers, each with its number of processes.
        self.members = members

    def invite(self, explorers: Explorers, link: Callable[..., Any]) -> None:
        """Invites each explorer by a ``link``, which is made of the fields of its :class:`MeetingPlace`."""
        rank = 1
        for explorer, size in self.members.items():
            self._invited |= {_here(member): explorer for member in range(rank, rank + size)}
            explorers.connect(explorer, link(**vars(self.place) | {"rank": rank}))
            rank += size

    def gather(self) -> bool:
        """Waits until everyone has come; False if :meth:`close` was sooner."""
        while (store := self._store) is not None:
            if store.check(list(self._invited)):
                store.set(_GO, "")
                return True
            time.sleep(_MEET_S)
        return False

    def wait_connected(self) -> None:
        """Waits until every member is connected to all others."""
        if self._store is not None:
            self._store.wait([_connected(rank) for rank in range(1, self.world_size)])

    def absent(self) -> list[int]:
        """Explorers that have not come, or only with some of their processes."""
        store = self._store
        return [] if store is None else sorted({who for key, who in self._invited.items() if not store.check([key])})

    def close(self) -> None:
        """Ends the store: anyone on this machine could write into it, and a group that has met needs it no more."""
        self._store = None


@dataclass(frozen=True)
class MeetingPlace:
    """Where a member is to come, and as whom."""

    host: str
    port: int
    rank: int  #: Of the engine's first weight-holding process; the others follow.
    world_size: int
    timeout_s: float  #: Of the meeting and of each transfer.

    def come(self, member: int) -> Callable[[], None]:
        """Waits, as an engine's ``member``-th process, until all are there; returns what tells that it is connected."""
        rank, timeout = self.rank + member, timedelta(seconds=self.timeout_s)
        with link_errors():
            store = TCPStore(self.host, self.port, timeout=timeout)
            store.set(_here(rank), "")
            store.wait([_GO], timeout)
        return lambda: store.set(_connected(rank), "")


@contextmanager
def link_errors() -> Iterator[None]:
    """Turns what torch raises when a member of a group is gone into a :class:`LinkError`."""
    try:
        yield
    except RFTError:
        raise
    except RuntimeError as error:
        raise LinkError(f"the weight transport broke off: {error}") from error


def _here(rank: int) -> str:
    return f"here/{rank}"


def _connected(rank: int) -> str:
    return f"connected/{rank}"
