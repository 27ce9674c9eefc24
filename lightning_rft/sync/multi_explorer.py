"""(d) Multi-explorer asynchronous: explorers take turns to load, so exploration never stops as a whole."""

from __future__ import annotations

from typing import Literal

from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.sync.fully_asynchronous import FullyAsynchronous
from lightning_rft.sync.transports.transport import Transport

__all__ = ["MultiExplorerAsynchronous"]


class MultiExplorerAsynchronous(FullyAsynchronous):
    """Like :class:`FullyAsynchronous`, with two or more explorers that take turns to load new weights.

    With ``sync_interval=2``::

        explorer1 [R0][R2]c[R4][R6]c             R rollout   c load a checkpoint
        explorer2 [R1][R3][R5]c[R7]
        trainer   ····[T0][T1]C[T2][T3]C         T train     C write one, in the background

    Up to seven explorers load one after another, 64 of them 16 at a time. Bounds are those of
    :class:`FullyAsynchronous`, however many load at a time.

    Args:
        sync_interval: Batches between two pushes, ``k``.
        max_staleness: Maximum batches that a token may lag behind the version that is trained, at least ``k - 1``.
        overdue: What a step does about a group that is still explored and would be too old after it: ``"wait"``, or
            ``"drop"``, which never waits but loses long answers.
        transport: How weights travel; left out, by checkpoint. By collective in the background they load one after
            another in any case.
        in_flight: Whether explorers load new weights in mid-generation; else an explorer finishes its groups first.
        loading: Share of the explorers that may load at the same time, above 0 and below 1; one may in any case. With a
            larger one new weights are everywhere sooner, with a smaller one more explorers go on exploring meanwhile.

    Raises:
        ConfigurationError: As for :class:`FullyAsynchronous`, or ``loading`` is out of range.

    Example::

        data = RFTDataModule(tasks=tasks, reward=reward, explorers=2)
        trainer = L.Trainer(max_steps=100, callbacks=[MultiExplorerAsynchronous(max_staleness=2)])
    """

    def __init__(
        self,
        sync_interval: int = 1,
        max_staleness: int = 2,
        overdue: Literal["wait", "drop"] = "wait",
        transport: Transport | None = None,
        in_flight: bool = True,
        loading: float = 0.25,
    ) -> None:
        super().__init__(sync_interval, max_staleness, overdue, transport, in_flight)
        if not 0 < loading < 1:
            raise ConfigurationError(
                f"loading={loading} must be above 0 and below 1: it is the share of the explorers that may load at the "
                "same time. FullyAsynchronous() has all of them load at once"
            )
        # those that wait for their turn at a transport that serves one by one would get no work meanwhile
        self.loading = 0.0 if self.transport.one_by_one else loading

    @override
    def check(self, explorers: int) -> None:
        if explorers < 2:
            raise ConfigurationError(
                f"MultiExplorerAsynchronous needs two or more explorers to take turns, but RFTDataModule(explorers="
                f"{explorers}): set explorers=2, or use FullyAsynchronous()"
            )
