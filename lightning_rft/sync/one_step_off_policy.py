"""(b) One-step off-policy: the next batch is explored while this one is trained."""

from __future__ import annotations

from typing_extensions import override

from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.sync.transports.transport import Transport

__all__ = ["OneStepOffPolicy"]


class OneStepOffPolicy(SyncStrategy):
    """Explorers are one batch ahead: batch ``b + 1`` is explored while ``b`` is trained, and both meet at the sync.

    With ``sync_interval=1``::

        explorer  [R0][R1][S][R2][S][R3][S]      R rollout   T train
        trainer   ····[T0][S][T1][S][T2][S]      S sync      · waiting

    Batch ``b`` is explored with version ``max(0, floor((b - 1) / k) * k)``, so no token is staler than ``k`` batches.
    Batches are trained in order, and which version samples which batch repeats from run to run.

    Args:
        sync_interval: Batches between two pushes, ``k`` above.
        transport: How weights travel; left out, by collective: NCCL or CUDA IPC on GPUs, Gloo on CPUs.
        in_flight: Whether to push as soon as a push is due, in the middle of the next batch's generation. The trainer
            then never waits for the longest answer, but versions no longer repeat from run to run.

    Raises:
        ConfigurationError: ``sync_interval`` is below 1.

    Example::

        trainer = L.Trainer(max_steps=100, callbacks=[OneStepOffPolicy()])
    """

    def __init__(self, sync_interval: int = 1, transport: Transport | None = None, in_flight: bool = False) -> None:
        super().__init__(sync_interval=sync_interval, transport=transport)
        self.in_flight = in_flight

    @property
    @override
    def max_staleness(self) -> int:
        return self.sync_interval

    @override
    def admit(self, batch: int) -> int:
        # the last version pushed before batch - 1 is trained
        return max(0, (batch - 1) // self.sync_interval * self.sync_interval)
