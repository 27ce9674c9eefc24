"""The four strategies with ``TransformersEngine``, which needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import lightning_rft as rft
from benchmarks.gpu.fits import data_module, loop
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Figures, Measurement

__all__ = ["measurements", "with_engine"]

STRATEGIES: dict[type[rft.SyncStrategy], int] = {  # with the fewest explorers
    rft.Synchronous: 1,
    rft.OneStepOffPolicy: 1,
    rft.FullyAsynchronous: 1,
    rft.MultiExplorerAsynchronous: 2,
}


def measurements(machine: Machine) -> Iterator[Measurement]:
    """A short run of each."""
    return with_engine(machine, rft.TransformersEngine)


def with_engine(machine: Machine, engine: Callable[[], rft.Engine]) -> Iterator[Measurement]:
    """The same with an engine of another kind."""
    # For a quick look all have the explorers that one of them needs, so that these start only once.
    together = max(STRATEGIES.values()) if machine.quick else None
    for explorers in dict.fromkeys(together or fewest for fewest in STRATEGIES.values()):
        with data_module(machine, engine(), explorers) as data:
            for strategy, fewest in STRATEGIES.items():
                if (together or fewest) == explorers:
                    several = "s" if explorers > 1 else ""
                    what = f"{strategy.__name__}, {explorers} explorer{several}"
                    yield Measurement(what, partial(_run, machine, strategy, data))


def _run(machine: Machine, strategy: Callable[[], rft.SyncStrategy], data: rft.RFTDataModule) -> Figures:
    return loop(machine, strategy(), data)
