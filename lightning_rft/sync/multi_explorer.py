"""(d) Multi-explorer asynchronous: explorers load one after another, so exploration never stops as a whole."""

from __future__ import annotations

from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.sync.fully_asynchronous import FullyAsynchronous

__all__ = ["MultiExplorerAsynchronous"]


class MultiExplorerAsynchronous(FullyAsynchronous):
    """Like :class:`FullyAsynchronous`, with two or more explorers that load new weights one after another.

    With ``sync_interval=2``::

        explorer1 [R0][R2]c[R4][R6]c             R rollout   c load a checkpoint
        explorer2 [R1][R3][R5]c[R7]
        trainer   ····[T0][T1]C[T2][T3]C         T train     C write one, in the background

    Arguments, errors and bounds are those of :class:`FullyAsynchronous`.

    Example::

        data = RFTDataModule(tasks=tasks, reward=reward, explorers=2)
        trainer = L.Trainer(max_steps=100, callbacks=[MultiExplorerAsynchronous(max_staleness=2)])
    """

    staggered = True

    @override
    def check(self, explorers: int) -> None:
        if explorers < 2:
            raise ConfigurationError(
                f"MultiExplorerAsynchronous needs two or more explorers to take turns, but RFTDataModule(explorers="
                f"{explorers}): set explorers=2, or use FullyAsynchronous()"
            )
