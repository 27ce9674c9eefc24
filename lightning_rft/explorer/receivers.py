"""The explorers as a weight transport sees them: members that connect, load, and can be waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_rft.errors import LinkError
from lightning_rft.experience import TensorInfo
from lightning_rft.explorer.listener import GRACE_S, Listener
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.roster import Roster

__all__ = ["Receivers"]


class Receivers:
    """Implements ``sync.transports.transport.Explorers``; ``changed`` is called when an explorer begins to load."""

    def __init__(
        self, pool: ExplorerPool, roster: Roster, listener: Listener, folder: Path, changed: Callable[[], None]
    ) -> None:
        self.folder = folder
        self.raise_failures = listener.raise_failures
        self.connect = pool.connect
        self._pool = pool
        self._roster = roster
        self._listener = listener
        self._changed = changed

    def members(self) -> dict[int, int]:
        """Explorer index -> number of its processes that hold weights."""
        return self._roster.members

    @property
    def dtype(self) -> str:
        """Dtype of the engines' weights."""
        return self._pool.dtype

    @property
    def nccl(self) -> bool:
        """Whether every engine can receive by NCCL."""
        return self._pool.nccl

    def load(self, explorer: int, manifest: Sequence[TensorInfo], version: int) -> None:
        """Asks an explorer to receive ``version``; returns at once."""
        with self._listener.locked():
            self._roster.begin_load(explorer, time.monotonic())
            self._changed()
        self._pool.load(explorer, manifest, version)

    def wait_loaded(self, version: int, explorers: Sequence[int], timeout_s: float, setting: str) -> None:
        """Waits until each live one of ``explorers`` computes with ``version``, and replaces those that are late."""

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
        self.end(missing(), f"did not load version {version} in time: raise {setting}, or see its log")

    def end(self, explorers: Sequence[int], blame: str) -> None:
        """Ends explorers that cannot be used, and returns when they are gone; others are started for them."""
        for explorer in explorers:
            self._pool.kill(explorer, blame)
        self._listener.wait(lambda: not self.members().keys() & set(explorers), "explorers to end", GRACE_S)

    def settle(self, explorers: Sequence[int], timeout_s: float) -> None:
        """Waits until none of ``explorers`` is loading; ends those that are stuck."""

        def stuck() -> list[int]:
            return [explorer for explorer in explorers if self._roster.is_loading(explorer)]

        deadline = time.monotonic() + timeout_s
        self._listener.wait(lambda: not stuck() or time.monotonic() > deadline, "loads that broke off")
        self.end(stuck(), "was stuck in a load that broke off")
