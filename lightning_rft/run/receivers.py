"""The explorers as receivers of weights: who has loaded which version, who is at it, and who is late or broken off."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_rft.errors import LinkError
from lightning_rft.experience import TensorInfo
from lightning_rft.explorer.listener import GRACE_S, Listener
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.watch import Watch

__all__ = ["Receivers"]


class Receivers:
    """What a weight transport asks of the explorers (``sync.transport.Explorers``), and what they answer to it.

    Args:
        pool: The explorers.
        watch: Is told who owes an answer.
        listener: Whose lock is held, and what waits for news.
        folder: The run's own folder.
        changed: Called under the lock when an explorer begins to load.
    """

    def __init__(
        self, pool: ExplorerPool, watch: Watch, listener: Listener, folder: Path, changed: Callable[[], None]
    ) -> None:
        self.folder = folder
        self._pool = pool
        self._watch = watch
        self._listener = listener
        self._changed = changed
        self._loaded: dict[int, int] = {}
        self._loading: dict[int, float] = {}  # since when
        self._broken: set[int] = set()  # whose last load broke off
        self._late: set[int] = set()  # who came up between two pushes of a strategy that waits for them
        self._served: set[int] = set()  # of those, to whom the trainer is bringing them

    # What a transport asks

    def members(self) -> dict[int, int]:
        """Explorer index -> number of processes inside it that hold weights."""
        return self._pool.members()

    @property
    def dtype(self) -> str:
        """Dtype of the engines' weights."""
        return self._pool.dtype

    @property
    def nccl(self) -> bool:
        """Whether every engine can receive by NCCL."""
        return self._pool.nccl

    def connect(self, explorer: int, link: Any) -> None:
        """Asks an explorer to join a weight transport."""
        self._pool.connect(explorer, link)

    def load(self, explorer: int, manifest: Sequence[TensorInfo], version: int) -> None:
        """Asks an explorer to receive a version."""
        with self._listener.lock:
            now = time.monotonic()
            self._loaded.pop(explorer, None)
            self._broken.discard(explorer)
            if explorer in self._pool.members():
                self._loading[explorer] = now
                self._watch.asked(explorer, now)
            self._changed()
        self._pool.load(explorer, manifest, version)

    def raise_failures(self) -> None:
        """Raises what ends the run, if something does."""
        self._listener.raise_failures()

    def wait_loaded(self, version: int, explorers: Sequence[int], timeout_s: float, setting: str) -> None:
        """Returns when each of ``explorers`` that is alive computes with ``version``.

        One that did not get it in time is ended, and another started for it.

        Args:
            version: What was pushed.
            explorers: To whom.
            timeout_s: Seconds within which it must be loaded.
            setting: What the user knows ``timeout_s`` as.

        Raises:
            LinkError: The transport broke off for one that is alive.
        """

        def missing() -> list[int]:
            members = self._pool.members()
            return [index for index in explorers if index in members and self._loaded.get(index) != version]

        def broken() -> list[int]:
            return [index for index in missing() if index in self._broken]

        deadline = time.monotonic() + timeout_s
        what = f"version {version} to be loaded"
        self._listener.wait(lambda: not missing() or bool(broken()) or time.monotonic() > deadline, what)
        if broken():
            raise LinkError(f"the weight transport broke off for explorers {broken()}")
        self.end(missing(), f"did not load version {version} in time: raise {setting}, or see its log")

    def end(self, explorers: Sequence[int], blame: str) -> None:
        """Ends explorers that are of no use; others are started for them. Returns when they are gone."""
        for explorer in explorers:
            self._pool.kill(explorer, blame)
        self._listener.wait(lambda: not self._pool.members().keys() & set(explorers), "explorers to end", GRACE_S)

    def settle(self, explorers: Sequence[int], timeout_s: float) -> None:
        """Returns when none of ``explorers`` is in the middle of a load; one that is stuck in it is ended."""

        def stuck() -> list[int]:
            return [index for index in explorers if index in self._loading]

        deadline = time.monotonic() + timeout_s
        self._listener.wait(lambda: not stuck() or time.monotonic() > deadline, "loads that broke off")
        self.end(stuck(), "was stuck in a load that broke off")

    # What explorers answer; all of it under the lock

    def loaded(self, explorer: int, version: int) -> float:
        """Takes in that an explorer computes with a version; returns when it was asked to."""
        self._watch.answered(explorer, time.monotonic())
        self._loaded[explorer] = version
        self._late.discard(explorer)
        return self._loading.pop(explorer)

    def broke_off(self, explorer: int) -> None:
        """Takes in that an explorer's load broke off."""
        self._watch.answered(explorer, time.monotonic())
        self._loading.pop(explorer)
        self._broken.add(explorer)

    def gone(self, explorer: int) -> None:
        """Notes that an explorer is dead."""
        self._loading.pop(explorer, None)
        self._loaded.pop(explorer, None)
        self._late.discard(explorer)

    def is_loading(self, explorer: int) -> bool:
        """Whether an explorer is in the middle of a load."""
        return explorer in self._loading

    def able(self) -> list[int]:
        """Who is alive and has weights."""
        return [explorer for explorer in self._pool.members() if explorer in self._loaded]

    # Who comes up between two pushes

    def late(self, explorer: int) -> None:
        """Notes that an explorer needs weights before the next push."""
        self._late.add(explorer)

    @property
    def any_late(self) -> bool:
        """Whether some need weights before the next push."""
        return bool(self._late)

    def serve(self, bring: Callable[[Sequence[int]], None]) -> None:
        """Has weights brought to those that are late; on the trainer's thread.

        Args:
            bring: Pushes the weights of this moment to some explorers.
        """
        with self._listener.lock:
            late, self._late = self._late & self._pool.members().keys(), set()
        if late:
            self._served = late
            bring(sorted(late))
            self._served = set()

    def is_served(self, explorer: int) -> bool:
        """Whether an explorer gets its weights by :meth:`serve`, while the others go on."""
        return explorer in self._served
