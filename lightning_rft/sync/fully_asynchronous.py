"""(c) Fully asynchronous: explorers and trainer wait only when the staleness bound is reached."""

from __future__ import annotations

from typing import Literal

from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.sync.transports.checkpoint import CheckpointTransport
from lightning_rft.sync.transports.transport import Transport

__all__ = ["FullyAsynchronous"]


class FullyAsynchronous(SyncStrategy):
    """Explorers explore, the trainer trains, and new weights follow in the background.

    With ``sync_interval=2``::

        explorer  [R0][R1][R2]c[R3][R4]c[R5]      R rollout   c load a checkpoint
        trainer   ····[T0][T1]C[T2][T3]C[T4]      T train     C write one, in the background

    A group of batch ``b`` may be explored with version ``b - max_staleness`` or newer, and a step trains the groups
    with the oldest weights first, so no token is staler than ``max_staleness`` batches when it is trained. Training
    what finishes first would discard long answers, so a step waits for a group that would be too old after it.

    Args:
        sync_interval: Batches between two pushes, ``k``.
        max_staleness: Maximum batches that a token may lag behind the version that is trained, at least ``k - 1``. A
            larger value means less waiting and training that is further off-policy.
        overdue: What a step does about a group that is still explored and would be too old after it: ``"wait"``, or
            ``"drop"``, which never waits but loses long answers.
        transport: How weights travel; left out, by checkpoint.
        in_flight: Whether explorers load new weights in mid-generation, between two tokens (each token has its own
            version); else an explorer finishes its groups first.

    Raises:
        ConfigurationError: ``sync_interval`` is below 1, or ``max_staleness`` below ``sync_interval - 1``.

    Example::

        trainer = L.Trainer(max_steps=100, callbacks=[FullyAsynchronous(max_staleness=2)])
    """

    asynchronous = True

    def __init__(
        self,
        sync_interval: int = 1,
        max_staleness: int = 2,
        overdue: Literal["wait", "drop"] = "wait",
        transport: Transport | None = None,
        in_flight: bool = True,
    ) -> None:
        super().__init__(sync_interval=sync_interval, transport=transport or CheckpointTransport())
        if max_staleness < sync_interval - 1:
            raise ConfigurationError(
                f"max_staleness={max_staleness} with sync_interval={sync_interval} can never make progress: batch "
                f"{sync_interval - 1} would need version {sync_interval - 1 - max_staleness}, but until it is trained "
                f"there is only version 0. Set max_staleness to at least sync_interval - 1 = {sync_interval - 1}"
            )
        if overdue not in ("wait", "drop"):
            raise ConfigurationError(f"overdue={overdue!r}: use 'wait' or 'drop'")
        self._max_staleness = max_staleness
        self.overdue = overdue
        self.in_flight = in_flight

    @property
    @override
    def max_staleness(self) -> int:
        return self._max_staleness

    @override
    def admit(self, batch: int) -> int:
        return max(0, batch - self._max_staleness)
