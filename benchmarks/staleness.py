"""Wall time and reward by staleness, at equal tokens: every strategy with its bound from 0 to 8.

    python -m benchmarks.staleness                                      # seed 0: three quarters of an hour
    python -m benchmarks.staleness --only FullyAsynchronous --seeds 1   # in parts

Every run trains the demo's model on the demo's task for as many samples, and is judged by 100 held-out sums, answered
greedily by the policy at its end: rewards in training are those of older policies. Runs that
``benchmarks/results/staleness.json`` has already are not run again: delete them there to measure anew. Draws
``docs/images/staleness-bounds.png``, unless ``--figure`` names another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # trainer and explorers share the cores

import lightning as L

import lightning_rft as rft
from benchmarks.strategies import RESULTS, column, demo_task, fit, policy, smollm2

BOUNDS = (0, 1, 2, 4, 8)
KINDS: dict[str, tuple[int, Callable[[int], rft.SyncStrategy], str]] = {  # explorers, by the bound, color
    "Synchronous": (1, lambda bound: rft.Synchronous(sync_interval=bound + 1), "#525252"),
    "OneStepOffPolicy": (1, lambda bound: rft.OneStepOffPolicy(), "#d94801"),
    "FullyAsynchronous": (1, lambda bound: rft.FullyAsynchronous(max_staleness=bound), "#238b45"),
    "MultiExplorerAsynchronous": (2, lambda bound: rft.MultiExplorerAsynchronous(max_staleness=bound), "#08519c"),
}
BOUNDS_OF = {
    "Synchronous": BOUNDS,
    "OneStepOffPolicy": (1,),
    "FullyAsynchronous": BOUNDS[1:],
    "MultiExplorerAsynchronous": BOUNDS[1:],
}


def held_out_reward(module: rft.RFTModule, data: rft.RFTDataModule) -> float:
    """The share of held-out sums that the policy gets right."""
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision=module.trainer.precision,
        callbacks=[rft.Synchronous()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    return float(trainer.validate(module, datamodule=data, verbose=False)[0]["val/reward"])


def run(kind: str, bound: int, seed: int, steps: int, data: rft.RFTDataModule, model: Path) -> dict[str, Any]:
    """One training run, and what its policy gets right at the end."""
    L.seed_everything(seed, verbose=False)
    strategy, module = KINDS[kind][1](bound), policy(model)
    assert strategy.max_staleness == bound
    logs, seconds = fit(module, data, strategy, steps, Path("runs/staleness"), f"{kind}-{bound}-{seed}")
    metrics = logs / "metrics.csv"
    samples = data.tasks_per_step * data.samples_per_task
    return {
        "strategy": kind,
        "bound": bound,
        "seed": seed,
        "steps": steps,
        "reward": column(metrics, "rft/reward"),
        "held_out": held_out_reward(module, data),
        "tokens": samples * sum(column(metrics, "rft/completion_length")),
        "seconds_per_step": seconds / (steps - 1),
        "staleness_mean": statistics.fmean(column(metrics, "rft/staleness_mean")),
        "staleness_max": max(column(metrics, "rft/staleness_max")),
        "kl_max": max(column(metrics, "rft/kl")),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each strategy and bound, means over the seeds and medians of times; Markdown."""
    lines = [
        "| strategy | bound | seeds | staleness mean (max) | held-out, at the end | reward, last ten steps | s/step |"
        " tokens trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, bound in sorted({(row["strategy"], row["bound"]) for row in rows}, key=lambda of: (_order(of[0]), of[1])):
        runs = [row for row in rows if (row["strategy"], row["bound"]) == (kind, bound)]
        lines.append(
            f"| {kind} | {bound} | {len(runs)} | {statistics.fmean(row['staleness_mean'] for row in runs):.1f}"
            f" ({max(row['staleness_max'] for row in runs):.0f}) |"
            f" {statistics.fmean(row['held_out'] for row in runs):.2f} |"
            f" {statistics.fmean(statistics.fmean(row['reward'][-10:]) for row in runs):.2f} |"
            f" {statistics.median(row['seconds_per_step'] for row in runs):.1f} |"
            f" {statistics.fmean(row['tokens'] for row in runs):,.0f} |"
        )
    return "\n".join(lines)


def _order(kind: str) -> int:
    return list(KINDS).index(kind)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """What the policies get right and earn, and the seconds of a step, over the bound; every seed a point."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    shown: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("held-out sums right, at the end", lambda row: float(row["held_out"])),
        ("reward in training, last ten steps", lambda row: statistics.fmean(row["reward"][-10:])),
        ("seconds a step", lambda row: float(row["seconds_per_step"])),
    ]
    for axes, (label, value) in zip(all_axes, shown, strict=True):
        for kind, (_, _, color) in KINDS.items():
            points = [(row["bound"], value(row)) for row in rows if row["strategy"] == kind]
            bounds = sorted({bound for bound, _ in points})
            middle = [statistics.median(height for at, height in points if at == bound) for bound in bounds]
            axes.plot(bounds, middle, color=color, linewidth=2, marker="o", markersize=6, label=kind)
            if len(points) > len(bounds):
                axes.plot(*zip(*points, strict=True), "o", color=color, markersize=3, alpha=0.5)
        axes.set(xlabel="largest staleness that is allowed, in steps", ylabel=label, xticks=BOUNDS)
        axes.set_ylim(0, 1 if "seconds" not in label else None)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].legend(loc="lower left", frameon=False)
    samples = {row["steps"] * 32 for row in rows}
    figure.suptitle(f"Every run trains {', '.join(map(str, sorted(samples)))} samples", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Runs what was asked for and is not there yet, writing after every run what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--bounds", nargs="+", type=int, choices=BOUNDS, default=list(BOUNDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=30, help="at least 2")
    figure = Path(__file__).parents[1] / "docs" / "images" / "staleness-bounds.png"
    parser.add_argument("--figure", type=Path, default=figure)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))
    path = RESULTS / "staleness.json"
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(row["strategy"], row["bound"], row["seed"]) for row in results if row["steps"] == arguments.steps}
    for seed in arguments.seeds:
        for explorers in (1, 2):
            missing = [
                (kind, bound)
                for kind in arguments.only
                for bound in BOUNDS_OF[kind]
                if KINDS[kind][0] == explorers and bound in arguments.bounds and (kind, bound, seed) not in done
            ]
            if not missing:
                continue
            with demo_task(seed, explorers, validates=True) as data:
                for kind, bound in missing:
                    results.append(run(kind, bound, seed, arguments.steps, data, model))
                    RESULTS.mkdir(exist_ok=True)
                    path.write_text(json.dumps(results, indent=1) + "\n")
                    print(table(results[-1:]).splitlines()[-1], flush=True)
    rows = [row for row in results if row["steps"] == arguments.steps]
    draw(rows, arguments.figure)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
