"""All sync strategies with both transports on the demo's task: what they learn, and who waits for whom.

    python -m benchmarks.strategies                        # four strategies, two transports, three seeds: an hour
    python -m benchmarks.strategies --seeds 1 2            # in parts: other runs that are there already stay
    python -m benchmarks.strategies --only c --steps 6     # a look

Writes ``benchmarks/results/strategies.json``, and every run's timeline into its own log folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # trainer and explorers share the cores

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

import lightning_rft as rft
from lightning_rft.hardware import fast_precision
from lightning_rft.rewards import last_number
from lightning_rft.trainer.loader import BatchPart

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from convert_smollm2 import smollm2
from demo import column, sums

RESULTS = Path(__file__).parent / "results"
STRATEGIES = {
    "a": ("Synchronous", 1, lambda transport: rft.Synchronous(transport=transport)),
    "b": ("OneStepOffPolicy", 1, lambda transport: rft.OneStepOffPolicy(transport=transport)),
    "c": ("FullyAsynchronous", 1, lambda transport: rft.FullyAsynchronous(transport=transport)),
    "d": ("MultiExplorerAsynchronous", 2, lambda transport: rft.MultiExplorerAsynchronous(transport=transport)),
}
TRANSPORTS = {"collective": rft.CollectiveTransport, "checkpoint": rft.CheckpointTransport}


class Steps(Callback):
    """The time of every step, and that rule 2 held in each."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: BatchPart, batch_idx: int) -> None:
        """Looks at every token."""
        versions = [v for g in batch.groups for e in g.experiences for turn in e.turns for v in turn.versions]
        assert all(0 <= batch.batch - version <= self.bound for version in versions)

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes the time."""
        self.times.append(time.perf_counter())


def demo_task(seed: int, explorers: int = 1, *, validates: bool = False) -> rft.RFTDataModule:
    """The demo's task, 4 tasks with 8 samples each a step, and explorers for it."""
    train, held_out = sums(seed)
    return rft.RFTDataModule(
        tasks=train,
        val_tasks=held_out if validates else None,
        reward=last_number,
        explorers=explorers,
        tasks_per_step=4,
        samples_per_task=8,
        max_new_tokens=12,
        sampling=rft.Sampling(seed=seed),
        engine=rft.VLLMEngine(),
    )


def fit(
    module: rft.RFTModule, data: rft.RFTDataModule, strategy: rft.SyncStrategy, steps: int, out: Path, name: str
) -> tuple[Path, float]:
    """Trains and returns the log folder, and the seconds from the end of the first step to that of the last."""
    logger, times = CSVLogger(out, name=name), Steps(strategy.max_staleness)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        precision=fast_precision("cuda" if torch.cuda.is_available() else "cpu"),
        gradient_clip_val=1.0,
        callbacks=[strategy, times, rft.TimelineCallback(logger.log_dir)],
        logger=logger,
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=out,
    )
    trainer.fit(module, data)
    return Path(logger.log_dir), times.times[-1] - times.times[0]


def policy(model: Path, objective: rft.Objective | None = None) -> rft.RFTModule:
    """The demo's model, trained as the demo trains it."""
    return rft.RFTModule(
        model, objective, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0, fused=True)
    )


def run(
    name: str, transport: str, seed: int, steps: int, data: rft.RFTDataModule, model: Path, out: Path
) -> dict[str, Any]:
    """One training run under one strategy."""
    L.seed_everything(seed, verbose=False)
    strategy = STRATEGIES[name][2](TRANSPORTS[transport]())
    logs, seconds = fit(policy(model), data, strategy, steps, out, f"{name}-{transport}-{seed}")
    metrics = logs / "metrics.csv"
    part = max(1, min(4, steps // 3))
    reward = column(metrics, "rft/reward")

    def share(*names: str) -> float:
        # without the first step, which has the start of everything in it
        return sum(sum(column(metrics, f"rft/{name}_s")[1:]) for name in names) / seconds

    return {
        "strategy": STRATEGIES[name][0],
        "transport": transport,
        "seed": seed,
        "steps": steps,
        "reward_first": statistics.fmean(reward[:part]),
        "reward_last": statistics.fmean(reward[-part:]),
        "reward": reward,
        "seconds_per_step": seconds / (steps - 1),
        "trainer_idle": share("wait_experience", "wait_push"),
        "explorer_idle": share("explorer_wait_weights", "explorer_wait_room"),
        "explorer_load": share("explorer_load"),
        "sync_s": statistics.median(column(metrics, "rft/sync_s")[1:]),
        "staleness_max": max(column(metrics, "rft/staleness_max")),
        "staleness_mean": statistics.fmean(column(metrics, "rft/staleness_mean")),
        "kl_max": max(column(metrics, "rft/kl")),
        "timeline": str(logs / "timeline.png"),
    }


def same_run(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether one measures again what the other measured."""
    return all(row[name] == other[name] for name in ("strategy", "transport", "seed", "steps"))


def table(results: list[dict[str, Any]]) -> str:
    """Rewards as means over the seeds, times as medians, which other work on the machine disturbs less; Markdown."""
    lines = [
        "| strategy | transport | reward, first steps | change ± standard error | s/step | trainer idle |"
        " explorers idle | loading | trainer held by sync, s | staleness mean (max) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for strategy, transport in dict.fromkeys((row["strategy"], row["transport"]) for row in results):
        rows = [row for row in results if (row["strategy"], row["transport"]) == (strategy, transport)]

        def mean(name: str, rows: list[dict[str, Any]] = rows) -> float:
            return statistics.fmean(row[name] for row in rows)

        def median(name: str, rows: list[dict[str, Any]] = rows) -> float:
            return statistics.median(row[name] for row in rows)

        changes = [row["reward_last"] - row["reward_first"] for row in rows]
        error = f" ± {statistics.stdev(changes) / len(changes) ** 0.5:.2f}" if len(changes) > 1 else ""
        lines.append(
            f"| {strategy} | {transport} | {mean('reward_first'):.2f} |"
            f" {statistics.fmean(changes):+.2f}{error} |"
            f" {median('seconds_per_step'):.1f} | {median('trainer_idle'):.0%} | {median('explorer_idle'):.0%} |"
            f" {median('explorer_load'):.0%} | {median('sync_s'):.2f} | {mean('staleness_mean'):.1f}"
            f" ({max(row['staleness_max'] for row in rows):.0f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what was asked for and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="abcd", help="letters of the strategies")
    parser.add_argument("--transports", nargs="+", default=list(TRANSPORTS), choices=list(TRANSPORTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/strategies"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))
    path = RESULTS / "strategies.json"
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for seed in arguments.seeds:
        for explorers in (1, 2):
            chosen = [name for name in STRATEGIES if name in arguments.only and STRATEGIES[name][1] == explorers]
            if not chosen:
                continue
            with demo_task(seed, explorers) as data:
                for name in chosen:
                    for transport in arguments.transports:
                        row = run(name, transport, seed, arguments.steps, data, model, arguments.out)
                        results = [kept for kept in results if not same_run(kept, row)] + [row]
                        RESULTS.mkdir(exist_ok=True)
                        path.write_text(json.dumps(results, indent=1) + "\n")
                        print(table(results[-1:]).splitlines()[-1], flush=True)
    print("\n" + table([row for row in results if row["steps"] == arguments.steps]))


if __name__ == "__main__":
    main()
