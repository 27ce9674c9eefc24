"""What the planner says of the strategies, against runs of them.

    python -m benchmarks.plan

Two explorers with FakeEngine and a trainer that sleeps, so that each side is as fast as it is told. The seconds are
measured as ``lightning-rft plan`` does it, under ``Synchronous``; then every strategy is run. Answers are of all
lengths, cut at 60 tokens. Writes ``benchmarks/results/plan.json``.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_rft as rft
from benchmarks.overlap import RESULTS, Sleeps, restless, seconds_per_step, spans
from lightning_rft.plan.advice import recommended
from lightning_rft.plan.figures import Case, Figures
from lightning_rft.plan.measure import MEASURING, at_once, measure, sample_seconds
from lightning_rft.plan.planner import plan
from lightning_rft.testing import tiny_model

STEPS, GROUPS, SAMPLES, TOKENS, EXPLORERS = 14, 4, 4, 60, 2
ROOM = GROUPS * SAMPLES // EXPLORERS
TRAIN_S = {"explorers are slower": 0.6, "trainer is slower": 1.6}
STRATEGIES: list[type[rft.SyncStrategy]] = [
    rft.Synchronous,
    rft.OneStepOffPolicy,
    rft.FullyAsynchronous,
    rft.MultiExplorerAsynchronous,
]


def module(model: Path, seconds: float) -> Sleeps:
    """A policy that trains for some seconds."""
    made = Sleeps(model)
    made.seconds = seconds
    return made


def figures(model: Path, seconds: float, data: rft.RFTDataModule) -> Figures:
    """What a few steps take."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            **MEASURING,
            accelerator="cpu",
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        found = measure(trainer, module(model, seconds), data, 60.0)
    assert found is not None
    room = at_once(GROUPS, SAMPLES, EXPLORERS, ROOM)
    sample_s = sample_seconds(found.tokens, found.explore_s, tasks_per_step=GROUPS, explorers=EXPLORERS, at_once=room)
    return Figures(
        train_s=found.train_s,
        push_s=found.push_s,
        load_s=found.load_s,
        sample_s=sample_s,
        tasks_per_step=GROUPS,
        at_once=room,
    )


def compare(model: Path, seconds: float, data: rft.RFTDataModule) -> dict[str, Any]:
    """Predicted and measured seconds a step of every strategy."""
    known = figures(model, seconds, data)
    rows = plan(known, [Case(make(), EXPLORERS) for make in STRATEGIES])
    result: dict[str, Any] = {"train_s": known.train_s, "push_s": known.push_s, "load_s": known.load_s}
    for row, make in zip(rows, STRATEGIES, strict=True):
        measured = seconds_per_step(spans(make(), module(model, seconds), data, STEPS))
        result[make.__name__] = {
            "predicted": row.step_s,
            "measured": measured,
            "error": row.step_s / measured - 1,
        }
        print(make.__name__, result[make.__name__], flush=True)
    result["recommended"] = type(recommended(rows, 0.1).case.rule).__name__
    return result


def main() -> None:
    """Measures and writes."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "tiny")
        with rft.RFTDataModule(
            tasks=[f"{index} + 1 =" for index in range(GROUPS * STEPS)],
            reward=restless,
            engine=rft.FakeEngine(tokens_per_second=50.0, mean_tokens=30, max_num_seqs=ROOM),
            explorers=EXPLORERS,
            tasks_per_step=GROUPS,
            samples_per_task=SAMPLES,
            max_new_tokens=TOKENS,
        ) as data:
            for name, seconds in TRAIN_S.items():
                results[name] = compare(model, seconds, data)
    errors = [abs(found["error"]) for part in results.values() for found in part.values() if isinstance(found, dict)]
    results = {"largest_error": max(errors)} | results
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
