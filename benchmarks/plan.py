"""What the planner says of the strategies, against runs of them.

    python -m benchmarks.plan          # FakeEngine and vLLM: a quarter of an hour
    python -m benchmarks.plan --fake   # without vLLM, five minutes

First two explorers with FakeEngine and a trainer that sleeps, so that each side is as fast as it is told; answers are
of all lengths, cut at 60 tokens. Then vLLM and the demo's model, with a core for each side. The seconds are measured as
``lightning-rft plan`` does it, under ``Synchronous``; then every strategy is run. ``recommended_was_fastest`` says if
that held wherever the plan saw strategies differ by more than a fifth. Writes ``benchmarks/results/plan.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_rft as rft
from benchmarks.overlap import (
    RESULTS,
    TRAINER_CORE,
    PinnedVLLM,
    Sleeps,
    pin,
    restless,
    seconds_per_step,
    spans,
)
from lightning_rft.plan.advice import recommended
from lightning_rft.plan.figures import Case, Figures
from lightning_rft.plan.measure import MEASURING, at_once, measure, sample_seconds
from lightning_rft.plan.planner import plan
from lightning_rft.testing import tiny_model

STEPS, GROUPS, SAMPLES, TOKENS, EXPLORERS = 14, 4, 4, 60, 2
ROOM = GROUPS * SAMPLES // EXPLORERS
CLEAR = 1.2  # times as slow as what is recommended
TRAIN_S = {"explorers are slower": 0.6, "trainer is slower": 1.6}
STRATEGIES: list[type[rft.SyncStrategy]] = [
    rft.Synchronous,
    rft.OneStepOffPolicy,
    rft.FullyAsynchronous,
    rft.MultiExplorerAsynchronous,
]


def figures(module: rft.RFTModule, data: rft.RFTDataModule, room: int | None) -> Figures:
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
        found = measure(trainer, module, data, 60.0)
    assert found is not None
    groups, explorers = data.tasks_per_step, data.explorers
    ran = at_once(groups, data.samples_per_task, explorers, room)
    return Figures(
        train_s=found.train_s,
        push_s=found.push_s,
        load_s=found.load_s,
        sample_s=sample_seconds(found.tokens, found.explore_s, tasks_per_step=groups, explorers=explorers, at_once=ran),
        tasks_per_step=groups,
        at_once=ran,
    )


def compare(
    make_module: Callable[[], rft.RFTModule], data: rft.RFTDataModule, room: int | None, steps: int
) -> dict[str, Any]:
    """Predicted and measured seconds a step of every strategy that so many explorers can run."""
    known = figures(make_module(), data, room)
    makes = [make for make in STRATEGIES if data.explorers > 1 or make is not rft.MultiExplorerAsynchronous]
    rows = plan(known, [Case(make(), data.explorers) for make in makes])
    result: dict[str, Any] = {"train_s": known.train_s, "push_s": known.push_s, "load_s": known.load_s}
    for row, make in zip(rows, makes, strict=True):
        measured = seconds_per_step(spans(make(), make_module(), data, steps))
        result[make.__name__] = {
            "predicted": row.step_s,
            "measured": measured,
            "error": row.step_s / measured - 1,
        }
        print(make.__name__, result[make.__name__], flush=True)
    chosen = recommended(rows, 0.1)
    result["recommended"] = type(chosen.case.rule).__name__
    slower = [row for row in rows if row.step_s > CLEAR * chosen.step_s]
    result["recommended_was_fastest"] = all(
        result[type(row.case.rule).__name__]["measured"] > result[result["recommended"]]["measured"] for row in slower
    )
    result["largest_error"] = max(abs(found["error"]) for found in result.values() if isinstance(found, dict))
    return result


def fake() -> dict[str, Any]:
    """Both sides are as fast as they are told."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "tiny")

        def make(seconds: float) -> Sleeps:
            made = Sleeps(model)
            made.seconds = seconds
            return made

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
                results[name] = compare(partial(make, seconds), data, ROOM, STEPS)
    return results


def vllm() -> dict[str, Any]:
    """The demo's model and vLLM, a core for each side; with five samples generating takes about as long as training."""
    from convert_smollm2 import smollm2

    model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))

    def make() -> rft.RFTModule:
        return rft.RFTModule(model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6, fused=True))

    prompts = [[{"role": "user", "content": f"Tell a long story about {index} cats."}] for index in range(STEPS)]
    with rft.RFTDataModule(
        tasks=[rft.Task(prompt) for prompt in prompts],
        reward=restless,
        engine=PinnedVLLM(),
        tasks_per_step=1,
        samples_per_task=5,
        max_new_tokens=52,
    ) as data:
        return compare(make, data, None, STEPS)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake", action="store_true", help="without vLLM")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    torch.set_num_threads(1)
    path = RESULTS / "plan.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results |= fake()
    if not arguments.fake:
        pin(TRAINER_CORE)
        results["vllm"] = vllm()
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
