"""The meeting of a group's members, at a store of rank 0's that listens until all are connected.

The store asks nobody who he is: what it takes and gives are strings, which nobody unpickles, and where the members of a
group can be reached. So it listens at one address, and only while a group is made; its keys have a name that only those
who were invited know; and the number of members is fixed, and not the store's to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from secrets import token_hex
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from lightning_rft.errors import LinkError, RFTError
from lightning_rft.network import listen
from lightning_rft.sync.transports.transport import Explorers

__all__ = ["Meeting", "MeetingPlace", "link_errors"]

_MEET_S = 0.001
_GO = "go"


class Meeting:
    """Rank 0's end, at ``host``, which is its own address as the explorers reach it.

    The making of a group cannot be broken off, so it begins when everyone has come; the end of the store frees a member
    that waits in vain for another.
    """

    def __init__(self, host: str, members: Mapping[int, int], timeout_s: float) -> None:
        self.world_size = 1 + sum(members.values())
        with listen(host, self.world_size) as server:  # torch's own would listen everywhere
            #: Where rank 0 itself is.
            self.place = MeetingPlace(host, server.getsockname()[1], 0, self.world_size, timeout_s, token_hex())
            store = TCPStore(
                host,
                self.place.port,
                is_master=True,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                master_listen_fd=server.detach(),
            )
        self._store: PrefixStore | None = PrefixStore(self.place.name, store)
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
        """Ends the store: anyone who reaches it could write into it, and a group that has met needs it no more."""
        self._store = None


@dataclass(frozen=True)
class MeetingPlace:
    """Where a member is to come, and as whom."""

    host: str
    port: int
    rank: int  #: Of the engine's first weight-holding process; the others follow.
    world_size: int
    timeout_s: float  #: Of the meeting and of each transfer.
    #: Begins all keys of the store, so that nobody who was invited by another run is taken for a member.
    name: str = field(repr=False)

    def store(self) -> PrefixStore:
        """The store, as a member sees it."""
        return PrefixStore(self.name, TCPStore(self.host, self.port, timeout=timedelta(seconds=self.timeout_s)))

    def come(self, member: int) -> Callable[[], None]:
        """Waits, as an engine's ``member``-th process, until all are there; returns what tells that it is connected."""
        rank = self.rank + member
        with link_errors():
            store = self.store()
            store.set(_here(rank), "")
            store.wait([_GO], timedelta(seconds=self.timeout_s))
        return lambda: store.set(_connected(rank), "")


@contextmanager
def link_errors() -> Iterator[None]:
    """Turns what torch or a socket raises when a member of a group is gone into a :class:`LinkError`."""
    try:
        yield
    except RFTError:
        raise
    except (RuntimeError, OSError) as error:
        raise LinkError(f"the weight transport broke off: {error}") from error


def _here(rank: int) -> str:
    return f"here/{rank}"


def _connected(rank: int) -> str:
    return f"connected/{rank}"
