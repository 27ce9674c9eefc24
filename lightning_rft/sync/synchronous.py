"""(a) Synchronous: explore, then train, then push the weights; strictly on-policy with ``sync_interval=1``."""

from __future__ import annotations

from typing_extensions import override

from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.sync.transports.transport import Transport

__all__ = ["Synchronous"]


class Synchronous(SyncStrategy):
    """Explorers and trainer take turns: weights go back after every ``sync_interval`` batches.

    With ``sync_interval=2``::

        explorer  [R0][R1]········[S][R2][R3]········[S]      R rollout   T train
        trainer   ····[T0][T1]    [S]····[T2][T3]    [S]      S sync      · waiting

    Batch ``b`` is explored with version ``floor(b / k) * k``, so no token is staler than ``k - 1`` batches, and which
    version samples which batch repeats from run to run.

    Args:
        sync_interval: Batches between two pushes, ``k`` above; 1 is strictly on-policy.
        transport: How weights travel; left out, by collective: NCCL or CUDA IPC on GPUs, Gloo on CPUs.

    Raises:
        ConfigurationError: ``sync_interval`` is below 1.

    Example::

        trainer = L.Trainer(max_steps=100, callbacks=[Synchronous()])
    """

    overlaps = False

    def __init__(self, sync_interval: int = 1, transport: Transport | None = None) -> None:
        super().__init__(sync_interval=sync_interval, transport=transport)

    @property
    @override
    def max_staleness(self) -> int:
        return self.sync_interval - 1

    @override
    def admit(self, batch: int) -> int:
        # the push before this batch's block of sync_interval batches
        return batch // self.sync_interval * self.sync_interval
