"""LoRA beside full fine-tuning on the demo's task: what they learn, what a push changes, how large a checkpoint is.

    python -m benchmarks.lora                        # both, three seeds, 30 steps: an hour and a half
    python -m benchmarks.lora --only LoRA --seeds 0  # in parts

Runs that ``benchmarks/results/lora.json`` has already are not run again: delete them there to measure anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_rft as rft
from benchmarks.strategies import RESULTS, column, demo_task, fit, policy, smollm2

OUT = Path("runs/lora")
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
LEARNING_RATE = 2e-4
PART = 4  # steps that the first and the last reward are means of


def adapted(model: Path) -> rft.RFTModule:
    """The demo's model with an adapter in every layer."""
    return rft.RFTModule(
        model,
        optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        peft_config=ADAPTER,
    )


KINDS = {"LoRA": adapted, "full": policy}


def run(kind: str, seed: int, steps: int, data: rft.RFTDataModule, model: Path) -> dict[str, Any]:
    """One training run, and the size of a checkpoint at its end."""
    L.seed_everything(seed, verbose=False)
    module = KINDS[kind](model)
    logs, seconds = fit(module, data, rft.Synchronous(), steps, OUT, f"{kind}-{seed}")
    file = logs / "end.ckpt"
    module.trainer.save_checkpoint(file)
    size = file.stat().st_size
    file.unlink()
    logged = {name: column(logs / "metrics.csv", f"rft/{name}") for name in ("reward", "kl", "push_gap")}
    return {
        "kind": kind,
        "seed": seed,
        "steps": steps,
        "reward": logged["reward"],
        "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "weights_bytes": sum(t.numel() * t.element_size() for t in module.state_dict().values()),
        "checkpoint_bytes": size,
        "seconds_per_step": seconds / (steps - 1),
        "weights_changed": column(logs / "metrics.csv", "rft/weights_changed"),
        "push_gap_max": max(logged["push_gap"]),
        "kl_max": max(logged["kl"]),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Means over the seeds, in Markdown."""
    lines = [
        "| | trained | checkpoint: weights, whole file | seeds | reward, first 4 steps | last 4 | change ± error"
        " | s/step | elements that a push changed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in results):
        rows = [row for row in results if row["kind"] == kind]
        ends = [(statistics.fmean(row["reward"][:PART]), statistics.fmean(row["reward"][-PART:])) for row in rows]
        first, last = (statistics.fmean(means) for means in zip(*ends, strict=True))
        changes = [after - before for before, after in ends]
        error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
        lines.append(
            f"| {kind} | {rows[0]['trained_parameters'] / 1e6:.1f} M |"
            f" {rows[0]['weights_bytes'] / 1e6:.0f}, {rows[0]['checkpoint_bytes'] / 1e6:.0f} MB | {len(rows)} |"
            f" {first:.2f} | {last:.2f} | {statistics.fmean(changes):+.2f} ± {error:.2f} |"
            f" {statistics.median(row['seconds_per_step'] for row in rows):.1f} |"
            f" {statistics.fmean(share for row in rows for share in row['weights_changed'][1:]):.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what was asked for and is not there yet, and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))
    path = RESULTS / "lora.json"
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for seed in arguments.seeds:
        there = {row["kind"] for row in results if (row["seed"], row["steps"]) == (seed, arguments.steps)}
        missing = [kind for kind in KINDS if kind not in there and arguments.only in (None, kind)]
        if not missing:
            continue
        with demo_task(seed) as data:
            for kind in missing:
                results.append(run(kind, seed, arguments.steps, data, model))
                path.write_text(json.dumps(results, indent=1) + "\n")
                print(table(results[-1:]).splitlines()[-1], flush=True)
    print("\n" + table([row for row in results if row["steps"] == arguments.steps]))


if __name__ == "__main__":
    main()
