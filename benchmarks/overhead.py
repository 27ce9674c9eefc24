"""What the loop itself costs per step, beside generating, training and Lightning: schedule, ledger, pipes, hooks, push.

    python -m benchmarks.overhead

With ``FakeEngine``, whose generation time is known, and a tiny model, synchronous, so that nothing hides behind
anything. What is subtracted is measured the same way: the very batches of that run once more, with the same module,
through a bare Lightning loop with neither strategy nor data module, whose loader sleeps as long as the engine did. (It
does sleep: after it, caches are cold, and the same training takes longer than it does back to back.) ``ms_per_step``
is the difference of the two step times; ``push_ms`` of it is the weight transfer. Writes
``benchmarks/results/overhead.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

import lightning_rft as rft
from benchmarks.overlap import restless
from lightning_rft.monitor.spans import Span
from lightning_rft.testing import tiny_model
from lightning_rft.trainer.loader import BatchPart

RESULTS = Path(__file__).parent / "results"
GROUPS, SAMPLES, TOKENS, GENERATION_S = 4, 8, 20, 0.1
FIRST = 5  # steps in which much happens for the first time


class Batches(Callback):
    """When every step ended, and what was trained."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.batches: list[BatchPart] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: BatchPart, batch_idx: int) -> None:
        """Keeps the batch."""
        self.batches.append(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes the time."""
        self.times.append(time.monotonic())

    @property
    def seconds_per_step(self) -> float:
        """From the end of one step to that of the next."""
        times = self.times[FIRST:]
        return statistics.median(times[i + 1] - times[i] for i in range(len(times) - 1))


class ReadyMade:
    """Hands out batches that are there already, each after the time that generating it took."""

    def __init__(self, batches: list[BatchPart]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[BatchPart]:
        """In order."""
        for batch in self._batches:
            for _ in range(TOKENS):
                time.sleep(GENERATION_S / TOKENS)
            yield batch


def trainer(steps: int, folder: str, *callbacks: Callback) -> L.Trainer:
    """The same for both, with nothing that is not needed."""
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        limit_val_batches=0,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def push_seconds(spans: list[Span]) -> float:
    """Of one push, the trainer's side."""
    return statistics.median([span.end - span.begin for span in spans if span.what == "sync"][FIRST:])


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"step_ms": [], "bare_step_ms": [], "push_ms": []}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "tiny")
        with rft.RFTDataModule(
            tasks=[f"{index} + 1 =" for index in range(GROUPS * arguments.steps)],
            reward=restless,
            engine=rft.FakeEngine(tokens_per_second=TOKENS / GENERATION_S, mean_tokens=10**6),
            tasks_per_step=GROUPS,
            samples_per_task=SAMPLES,
            max_new_tokens=TOKENS,
        ) as data:
            for _ in range(arguments.repeats):
                ours, bare, timeline = Batches(), Batches(), rft.TimelineCallback(Path(folder) / "timeline")
                trainer(arguments.steps, folder, ours, rft.Synchronous(), timeline).fit(rft.RFTModule(model), data)
                trainer(arguments.steps, folder, bare).fit(rft.RFTModule(model), ReadyMade(ours.batches))
                found["step_ms"].append(1000 * ours.seconds_per_step)
                found["bare_step_ms"].append(1000 * bare.seconds_per_step)
                found["push_ms"].append(1000 * push_seconds(timeline.spans))
    steps = zip(found["step_ms"], found["bare_step_ms"], strict=True)
    found = {"ms_per_step": [ours - bare for ours, bare in steps]} | found
    results = {name: round(statistics.median(values), 2) for name, values in found.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, values in found.items():
        print(f"{name:14} {results[name]:8.2f}   of", *(f"{value:.2f}" for value in values))


if __name__ == "__main__":
    main()
