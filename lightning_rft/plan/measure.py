"""The seconds of a run's parts, measured in a few steps under the strategy that does one thing after another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import GroupKey
from lightning_rft.monitor.spans import Span
from lightning_rft.simulation.driver import drive
from lightning_rft.sync.strategy import SyncStrategy
from lightning_rft.sync.synchronous import Synchronous
from lightning_rft.trainer.module import RFTModule

if TYPE_CHECKING:
    from lightning_rft.datamodule import RFTDataModule

__all__ = ["MEASURING", "Measured", "at_once", "measure", "sample_seconds"]

#: Settings of the trainer that measures. The first steps, in which much happens for the first time, do not count.
MEASURING: Mapping[str, Any] = {
    "max_steps": 14,
    "max_epochs": -1,
    "max_time": None,
    "min_steps": None,
    "min_epochs": None,
    "limit_train_batches": None,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}
_WARM_UP = 2
_LEAST = 3  # steps that count


@dataclass(frozen=True)
class Measured:
    """Means over the steps that count, and how many tokens each sample of their groups had."""

    train_s: float
    explore_s: float
    push_s: float
    load_s: float
    tokens: Sequence[Sequence[int]]


class _Watch(Callback):
    """Notes when steps begin, and who does what meanwhile; ends the run after some seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.spans: list[Span] = []
        self.began: dict[int, float] = {}
        self.tokens: dict[int, list[list[int]]] = {}

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch.batch not in self.began:
            self.began[batch.batch] = time.monotonic()
            self.tokens[batch.batch] = [[one.num_tokens for one in group.experiences] for group in batch.groups]

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        counted = batch.batch - _WARM_UP
        if batch.last and counted >= _LEAST:
            late = time.monotonic() - self.began[_WARM_UP] > self._seconds
            trainer.should_stop = trainer.strategy.reduce_boolean_decision(late, all=False)

    def measured(self) -> Measured:
        """The means."""
        steps = sorted(self.began)[_WARM_UP:]
        if len(steps) <= _LEAST:
            raise ConfigurationError(
                f"only {len(self.began)} steps were measured, of which the first {_WARM_UP} do not count: give the "
                "trainer more tasks, or train_s, explore_s and push_s"
            )
        explore_s = self._mean("trainer", "wait", steps[1:])
        push_s = self._mean("trainer", "sync", steps[1:]) + self._mean("trainer", "write checkpoint", steps[1:])
        step_s = (self.began[steps[-1]] - self.began[steps[0]]) / (len(steps) - 1)
        loads = [span.end - span.begin for span in self.spans if span.what.startswith("load") and span.version in steps]
        tokens = [group for step in steps for group in self.tokens[step]]
        samples = max(map(len, tokens))  # some may have failed
        tokens = [[*group, *[max(group)] * (samples - len(group))] for group in tokens]
        # what is neither waiting nor pushing is all that a step takes of the trainer, and not its computing alone
        return Measured(max(0.0, step_s - explore_s - push_s), explore_s, push_s, fmean(loads or [push_s]), tokens)

    def _mean(self, track: str, what: str, steps: Sequence[int]) -> float:
        """Mean seconds before each of some steps."""
        seconds = [
            span.end - span.begin
            for span in self.spans
            if span.track == track and span.what == what and (span.batch if what == "wait" else span.version) in steps
        ]
        return sum(seconds) / len(steps)


def measure(trainer: L.Trainer, module: RFTModule, data: RFTDataModule, seconds: float) -> Measured | None:
    """Trains a few steps, and returns what they took; on rank 0 alone."""
    if data.explorers == 0:
        raise ConfigurationError("explorers=0 has no side to measure beside the trainer's: add --data.explorers 1")
    watch = _Watch(seconds)
    found = [callback for callback in trainer.callbacks if isinstance(callback, SyncStrategy)]  # type: ignore[attr-defined]
    strategy = Synchronous(transport=found[0].transport if found else None)
    trainer.callbacks = [c for c in trainer.callbacks if c not in found] + [watch, strategy]  # type: ignore[attr-defined]
    data.buffer = replace(data.buffer, path=":memory:")  # that of the run stays as it is
    observe = watch.spans.append
    data.observers.append(observe)
    try:
        trainer.fit(module, data)
    finally:
        data.observers.remove(observe)
    return watch.measured() if trainer.is_global_zero else None


def at_once(tasks_per_step: int, samples: int, explorers: int, most: int | None = None) -> int:
    """Samples that an explorer ran at once, and is known to run at that speed."""
    share = -(-tasks_per_step // explorers) * samples
    return share if most is None else min(share, most)


def sample_seconds(
    tokens: Sequence[Sequence[int]], explore_s: float, *, tasks_per_step: int, explorers: int, at_once: int
) -> list[list[float]]:
    """Seconds of every sample, in proportion to its tokens, such that a batch takes ``explore_s`` in the mean."""
    batches = len(tokens) // tasks_per_step

    def duration(group: GroupKey, attempt: int) -> Sequence[float]:
        return tokens[group.batch * tasks_per_step + group.slot]

    events = drive(
        Synchronous(),
        batches=batches,
        groups_per_batch=tasks_per_step,
        explorers=explorers,
        samples=len(tokens[0]),
        duration=duration,
        train_time=0.0,
        room=at_once,
    )
    second_per_token = explore_s * batches / events[-1].time
    return [[count * second_per_token for count in group] for group in tokens]
