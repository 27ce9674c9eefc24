"""What the objectives learn on the demo's task, and what a correction is worth when experience is stale.

    python -m benchmarks.objectives                          # eight objectives, on policy, three seeds: two hours
    python -m benchmarks.objectives --stale                  # GRPO at staleness 4, corrected and not: half an hour
    python -m benchmarks.objectives --only GRPO --steps 2    # a look

Runs that ``benchmarks/results/objectives.json`` has already are not run again: delete them there to measure anew. With
``--stale``, the figure ``docs/images/staleness.png`` is drawn too, unless ``--figure`` names another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning as L

import lightning_rft as rft
from benchmarks.strategies import RESULTS, column, demo_task, fit, policy, smollm2

ON_POLICY: dict[str, rft.Objective] = {
    "GRPO": rft.GRPO(),
    "DrGRPO": rft.DrGRPO(),
    "DAPO": rft.DAPO(),
    "GSPO": rft.GSPO(),
    "CISPO": rft.CISPO(),
    "RLOO": rft.RLOO(),
    "REINFORCEPlusPlus": rft.REINFORCEPlusPlus(),
    "SAPO": rft.SAPO(),
}
MAX_STALENESS = 4
STALE: dict[str, rft.Objective] = {
    "GRPO, truncated weights": rft.GRPO(correction=rft.Truncated()),
    "GRPO, no correction": rft.GRPO(correction=None),
}
COLORS = ["#238b45", "#08519c"]


def run(
    name: str, objective: rft.Objective, stale: bool, seed: int, steps: int, data: rft.RFTDataModule, model: Path
) -> dict[str, Any]:
    """One training run with one objective."""
    L.seed_everything(seed, verbose=False)
    strategy = rft.FullyAsynchronous(max_staleness=MAX_STALENESS) if stale else rft.Synchronous()
    folder = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    logs, seconds = fit(policy(model, objective), data, strategy, steps, Path("runs/objectives"), folder)
    metrics = logs / "metrics.csv"
    return {
        "objective": name,
        "strategy": type(strategy).__name__,
        "seed": seed,
        "steps": steps,
        "reward": column(metrics, "rft/reward"),
        "seconds_per_step": seconds / (steps - 1),
        "staleness_max": max(column(metrics, "rft/staleness_max")),
        "staleness_mean": statistics.fmean(column(metrics, "rft/staleness_mean")),
        "kl_max": max(column(metrics, "rft/kl")),
        "clip_fraction_max": max(column(metrics, "rft/clip_fraction")),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, the median of the times, and whether the rise exceeds twice its spread; Markdown."""
    lines = [
        "| objective | seeds | reward, first ten steps | last ten steps | rise ± spread over seeds | > 2 × spread |"
        " s/step | staleness mean (max) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["objective"] for row in rows):
        runs = [row for row in rows if row["objective"] == name]
        first, last = ([statistics.fmean(part(row["reward"])) for row in runs] for part in (first_ten, last_ten))
        rises = [after - before for before, after in zip(first, last, strict=True)]
        spread = statistics.stdev(rises) if len(rises) > 1 else float("nan")
        verdict = "–" if len(rises) < 2 else "yes" if statistics.fmean(rises) > 2 * spread else "no"
        lines.append(
            f"| {name} | {len(runs)} | {statistics.fmean(first):.2f} | {statistics.fmean(last):.2f} |"
            f" {statistics.fmean(rises):+.2f} ± {spread:.2f} | {verdict} |"
            f" {statistics.median(row['seconds_per_step'] for row in runs):.1f} |"
            f" {statistics.fmean(row['staleness_mean'] for row in runs):.1f}"
            f" ({max(row['staleness_max'] for row in runs):.0f}) |"
        )
    return "\n".join(lines)


def first_ten(reward: list[float]) -> list[float]:
    """The first ten steps; of a short run, its first half."""
    return reward[: min(10, max(1, len(reward) // 2))]


def last_ten(reward: list[float]) -> list[float]:
    """The last ten steps; of a short run, its second half."""
    return reward[-min(10, max(1, len(reward) // 2)) :]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The mean reward of each step over the seeds, and their standard deviation around it."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, color in zip(STALE, COLORS, strict=True):
        seeds = [row["reward"] for row in rows if row["objective"] == name]
        if not seeds:
            continue
        each_step = list(zip(*seeds, strict=True))
        steps, mean = range(1, len(each_step) + 1), [statistics.fmean(step) for step in each_step]
        spread = [statistics.stdev(step) if len(step) > 1 else 0.0 for step in each_step]
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=color, linewidth=2, label=f"{name} ({len(seeds)} seeds)")
    axes.set(
        xlabel="step",
        ylabel="share of correct answers",
        ylim=(-0.03, 1.05),
        title=f"Fully asynchronous, staleness up to {MAX_STALENESS}: mean of the seeds, and their standard deviation",
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Runs what was asked for and is not there yet, writing after every run what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stale", action="store_true", help="GRPO at staleness 4 with and without a correction")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join([*ON_POLICY, *STALE])}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30, help="at least 2")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "staleness.png")
    arguments = parser.parse_args()
    objectives = STALE if arguments.stale else ON_POLICY
    chosen = arguments.only or list(objectives)
    if unknown := set(chosen) - set(objectives):
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(objectives)}")
    if arguments.steps < 2:
        parser.error("--steps: a time per step takes at least 2")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))
    path = RESULTS / "objectives.json"
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(row["objective"], row["seed"]) for row in results if row["steps"] == arguments.steps}
    for seed in arguments.seeds:
        missing = [name for name in chosen if (name, seed) not in done]
        if not missing:
            continue
        with demo_task(seed) as data:
            for name in missing:
                row = run(name, objectives[name], arguments.stale, seed, arguments.steps, data, model)
                results.append(row)
                RESULTS.mkdir(exist_ok=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
                print(f"seed {seed}: {table([row]).splitlines()[-1]}", flush=True)
    rows = [row for row in results if row["objective"] in objectives and row["steps"] == arguments.steps]
    if arguments.stale:
        draw(rows, arguments.figure)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
