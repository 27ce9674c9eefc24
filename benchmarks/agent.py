"""What an agent learns: shares of right answers with its tool and without, before and after; see ``examples/agent.py``.

    python -m benchmarks.agent               # three seeds, 20 steps each: ten minutes
    python -m benchmarks.agent --seeds 0     # in parts

Runs that ``benchmarks/results/agent.json`` has already are not run again: delete them there to measure anew. The figure
``docs/images/agent.png`` is drawn from all of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "agent.json"
FIGURE = ROOT / "docs" / "images" / "agent.png"
LIMIT_S = 3600


def run(seed: int) -> dict[str, Any]:
    """One run of the example, in a process of its own."""
    out = ROOT / "runs" / "agent" / f"seed-{seed}"
    logged = {*out.glob("version_*")}
    subprocess.run(
        [sys.executable, "examples/agent.py"],
        cwd=ROOT,
        env=os.environ | {"SEED": str(seed), "OUT": str(out)},
        check=True,
        timeout=LIMIT_S,
    )
    (folder,) = {*out.glob("version_*")} - logged
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in rows if row.get(name)]

    return {
        "seed": seed,
        "reward": column("rft/reward"),
        "with": column("val/with/reward"),
        "without": column("val/without/reward"),
        "drift": max(column("rft/workflow_drift"), default=0.0),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Share of right answers to held-out sums, by seed; Markdown."""
    lines = [
        "| seed | with the calculator, before | after | without it, before | after | drift |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = [row[name][place] for name in ("with", "without") for place in (0, -1)]
        lines.append(f"| {row['seed']} | {' | '.join(f'{share:.2f}' for share in shares)} | {row['drift']:g} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The reward of each step: every seed, and their mean."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row in rows:
        axes.plot(range(1, len(row["reward"]) + 1), row["reward"], color="#238b45", alpha=0.35, linewidth=1)
    mean = [statistics.fmean(step) for step in zip(*(row["reward"] for row in rows), strict=True)]
    axes.plot(range(1, len(mean) + 1), mean, color="#238b45", linewidth=2.5, label=f"mean of {len(rows)} seeds")
    axes.set(xlabel="step", ylabel="share of right answers", ylim=(-0.03, 1.05))
    axes.set_title("Sums of three digits with a calculator, through OpenAI's client", fontsize=10)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Runs what is not there yet, writing after every run what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for seed in arguments.seeds:
        if all(row["seed"] != seed for row in rows):
            rows.append(run(seed))
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, FIGURE)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
