"""How much of what overlapping can gain is gained: one-step off-policy and fully asynchronous against synchronous.

    python -m benchmarks.overlap            # FakeEngine and vLLM
    python -m benchmarks.overlap --fake     # without vLLM, a minute

One core is the explorer's and one the trainer's in every mode, and the work is such that generating (Tg) takes about
as long as training (Tt). With Ts for a push, synchronous takes Tg + Tt + Ts a step; nothing that pushes in every step
can be faster than max(Tg, Tt) + Ts. All three are measured in the synchronous run, and a figure is the share of that
bound that a mode reaches. Writes ``benchmarks/results/overlap.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import lightning as L
import torch

import lightning_rft as rft
from lightning_rft.monitor.spans import Span
from lightning_rft.testing import tiny_model
from lightning_rft.trainer.loader import BatchPart

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

RESULTS = Path(__file__).parent / "results"
TRAINER_CORE, EXPLORER_CORE = 0, 1
MODES: dict[str, Callable[[], rft.SyncStrategy]] = {
    "synchronous": rft.Synchronous,
    "one_step": rft.OneStepOffPolicy,
    "fully_async": rft.FullyAsynchronous,
}


class PinnedFake(rft.FakeEngine):
    """Generates on a core of its own."""

    def start(self, model: str, *, max_model_len: int, seed: int) -> None:
        """Takes its core."""
        pin(EXPLORER_CORE)
        super().start(model, max_model_len=max_model_len, seed=seed)


class PinnedVLLM(rft.VLLMEngine):
    """Generates on a core of its own, with one thread."""

    def environment(self, threads: int) -> dict[str, str]:
        """One thread, whatever there is."""
        return super().environment(1)

    def start(self, model: str, *, max_model_len: int, seed: int) -> None:
        """Takes its core, once the engine is up: OpenMP puts its threads where the process began."""
        super().start(model, max_model_len=max_model_len, seed=seed)
        pin(EXPLORER_CORE)


class Sleeps(rft.RFTModule):
    """Trains for as long as it is told."""

    seconds = 0.0

    def training_step(self, batch: BatchPart, batch_idx: int) -> torch.Tensor:
        """A step of the tiny model, and the rest of the time asleep: as if an accelerator computed."""
        began = time.monotonic()
        loss = super().training_step(batch, batch_idx)
        time.sleep(max(0.0, self.seconds - (time.monotonic() - began)))
        return loss


def pin(*cores: int) -> None:
    """Keeps every thread of this process on these cores."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def restless(completion: str, task: rft.Task) -> float:
    """A reward that differs within every group, so that every step trains."""
    return float(sum(map(ord, completion)) % 101)


def spans(strategy: rft.SyncStrategy, module: rft.RFTModule, data: rft.RFTDataModule, steps: int) -> list[Span]:
    """Trains, and returns what everyone did."""
    timeline = rft.TimelineCallback()
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[timeline, strategy],
            logger=False,
            limit_val_batches=0,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, data)
    return timeline.spans


def trains(found: list[Span]) -> list[Span]:
    """The training steps without the first two, in which much happens for the first time."""
    return sorted((span for span in found if span.what == "train"), key=lambda span: span.begin)[2:]


def seconds_per_step(found: list[Span]) -> float:
    """From the begin of one step to that of the next."""
    steps = trains(found)
    return (steps[-1].begin - steps[0].begin) / (len(steps) - 1)


def measure(
    make_module: Callable[[], rft.RFTModule], data: rft.RFTDataModule, steps: int, repeats: int
) -> dict[str, float]:
    """All modes in turn, several times: the medians."""
    per_step: dict[str, list[float]] = {name: [] for name in MODES}
    parts: dict[str, list[float]] = {"generate_s": [], "train_s": [], "push_s": []}
    for _ in range(repeats):
        for name, make in MODES.items():
            found = spans(make(), make_module(), data, steps)
            per_step[name].append(seconds_per_step(found))
            if name == "synchronous":
                batches = {span.batch for span in trains(found)}
                rollouts = [span for span in found if span.what == "rollout" and span.batch in batches]
                parts["generate_s"].append(
                    statistics.median(
                        max(span.end for span in rollouts if span.batch == batch)
                        - min(span.begin for span in rollouts if span.batch == batch)
                        for batch in batches
                    )
                )
                parts["train_s"].append(statistics.median(span.end - span.begin for span in trains(found)))
                syncs = [span.end - span.begin for span in found if span.what == "sync" and span.track == "trainer"]
                parts["push_s"].append(statistics.median(syncs[2:]))
    result = {name: statistics.median(values) for name, values in parts.items()}
    generate, train, push = result["generate_s"], result["train_s"], result["push_s"]
    result["bound"] = (generate + train + push) / (max(generate, train) + push)
    result |= {f"{name}_s_per_step": statistics.median(values) for name, values in per_step.items()}
    for name in ("one_step", "fully_async"):
        ratios = [slow / fast for slow, fast in zip(per_step["synchronous"], per_step[name], strict=True)]
        result[f"{name}_speedup"] = statistics.median(ratios)
        result[name] = result[f"{name}_speedup"] / result["bound"]
    return result


def fake(seconds: float, steps: int, repeats: int) -> dict[str, float]:
    """Generation and training that take as long as they are told, by sleeping."""
    tokens = 40
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "tiny")

        def make() -> rft.RFTModule:
            module = Sleeps(model)
            module.seconds = seconds
            return module

        with rft.RFTDataModule(
            tasks=[f"{index} + 1 =" for index in range(4 * steps)],
            reward=restless,
            engine=PinnedFake(tokens_per_second=tokens / seconds, mean_tokens=10**6),
            tasks_per_step=4,
            samples_per_task=4,
            max_new_tokens=tokens,
        ) as data:
            return measure(make, data, steps, repeats)


def vllm(steps: int, repeats: int) -> tuple[dict[str, float], float]:
    """The demo's model; few samples, because then generating takes about as long as training on these cores."""
    from convert_smollm2 import smollm2

    model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))

    def make() -> rft.RFTModule:
        return rft.RFTModule(model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6, fused=True))

    def make_data(engine: rft.Engine) -> rft.RFTDataModule:
        tasks = [[{"role": "user", "content": f"Tell a long story about {index} cats."}] for index in range(steps)]
        return rft.RFTDataModule(
            tasks=[rft.Task(prompt) for prompt in tasks],
            reward=restless,
            engine=engine,
            tasks_per_step=1,
            samples_per_task=5,
            max_new_tokens=52,
        )

    with make_data(PinnedVLLM()) as data:
        result = measure(make, data, steps, repeats)
    pin(TRAINER_CORE, EXPLORER_CORE)
    torch.set_num_threads(2)
    with make_data(rft.VLLMEngine()) as data:
        both = statistics.median(
            seconds_per_step(spans(rft.Synchronous(), make(), data, steps)) for _ in range(repeats)
        )
    return result, both


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake", action="store_true", help="without vLLM")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    torch.set_num_threads(1)
    pin(TRAINER_CORE)
    results: dict[str, Any] = {"fake": fake(0.4, 16, arguments.repeats)}
    figures = {f"fake_{name}": results["fake"][name] for name in ("one_step", "fully_async")}
    if not arguments.fake:
        results["vllm"], both = vllm(8, max(1, arguments.repeats - 1))
        results["vllm_synchronous_with_both_cores_s_per_step"] = both
        figures |= {f"vllm_{name}": results["vllm"][name] for name in ("one_step", "fully_async")}
    results = figures | results
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overlap.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
