"""The explorers as a weight transport sees them: members that connect, load, and can be waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_rft.errors import LinkError
from lightning_rft.experience import TensorInfo
from lightning_rft.explorer.listener import GRACE_S, Listener
from lightning_rft.explorer.messages import Connect, Load
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.roster import Roster
from lightning_rft.sync.transports.transport import Explorers

__all__ = ["Receivers"]


class Receivers(Explorers):
    """The explorers of a run; ``changed`` is called when one begins to load."""

    def __init__(
        self, pool: ExplorerPool, roster: Roster, listener: Listener, folder: Path, changed: Callable[[], None]
    ) -> None:
        self.folder = folder
        #: What explorers score after a load.
        self.text_ids: tuple[int, ...] = ()
        self._pool = pool
        self._roster = roster
        self._listener = listener
        self._changed = changed

    def late(self) -> list[int]:
        """Marks those that want weights as about to load by themselves, and returns them."""
        with self._listener.locked():
            return sorted(self._roster.load_alone())

    @override
    def members(self) -> dict[int, int]:
        return self._roster.members

    @property
    @override
    def address(self) -> str:
        return self._pool.address

    @property
    @override
    def dtype(self) -> str:
        return self._pool.dtype

    @property
    @override
    def nccl(self) -> bool:
        return self._pool.nccl

    @property
    @override
    def ipc(self) -> bool:
        return not self._pool.placed.apart and all(started.ipc for started in self._pool.up.values())

    @override
    def connect(self, explorer: int, link: Any) -> None:
        self._pool.send(explorer, Connect(link))

    @override
    def load(self, explorer: int, manifest: Sequence[TensorInfo], version: int) -> None:
        with self._listener.locked():
            self._roster.begin_load(explorer, time.monotonic())
            self._changed()
        self._pool.send(explorer, Load(manifest, version, self.text_ids))

    @override
    def raise_failures(self) -> None:
        self._listener.raise_failures()

    @override
    def wait_loaded(self, version: int, explorers: Sequence[int], timeout_s: float) -> list[int]:
        def missing() -> list[int]:
            return self._roster.without(version, explorers)

        def broken() -> list[int]:
            return self._roster.broken(missing())

        deadline = time.monotonic() + timeout_s
        self._listener.wait(
            lambda: not missing() or bool(broken()) or time.monotonic() > deadline, f"version {version} to be loaded"
        )
        if broken():
            raise LinkError(f"the weight transport broke off for explorers {broken()}")
        return missing()

    @override
    def end(self, explorers: Sequence[int], blame: str) -> None:
        for explorer in explorers:
            self._pool.kill(explorer, blame)
        self._listener.wait(lambda: not self.members().keys() & set(explorers), "explorers to end", GRACE_S)

    @override
    def settle(self, explorers: Sequence[int], timeout_s: float) -> list[int]:
        def stuck() -> list[int]:
            return [explorer for explorer in explorers if self._roster.is_loading(explorer)]

        deadline = time.monotonic() + timeout_s
        self._listener.wait(lambda: not stuck() or time.monotonic() > deadline, "loads that broke off")
        return stuck()
