"""How long the demo takes from the start of its process to the end of its first training step, and where that goes.

    python -m benchmarks.startup

The demo's settings, each time in a fresh process, when all files are in the page cache. Explorers are launched before
Lightning is imported, so two things go on at once: ``imports`` and ``trainer_ready`` are the trainer's side, and
``engine_ready`` is how much longer the explorer's takes, of which the trainer uses what it needs for a warm-up.
``train_first`` and ``train_later`` are a step's forward, backward and optimizer alone: the first one's, and the median
of four more. Writes ``benchmarks/results/startup.json``; every part is a median of its own, so they need not add up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MODEL = Path("runs/models/SmolLM2-135M-Instruct")
LATER = 4  # steps after the first


def child(out: Path, began: float, chosen: Path) -> None:
    """What the demo does until the end of its first step; ``began`` is when its process was started."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import lightning_rft as rft

    explorers = rft.ExplorerPool(rft.VLLMEngine())
    explorers.launch(out / "explorers")

    import warnings
    from typing import Any

    import lightning as L
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from convert_smollm2 import smollm2
    from demo import sums
    from lightning.pytorch.callbacks import Callback

    from lightning_rft.hardware import fast_precision
    from lightning_rft.rewards import last_number

    marks = {"imports": time.monotonic()}

    class Watch(Callback):
        def on_train_start(self, *_: Any) -> None:
            marks["trainer_ready"] = time.monotonic()

        def on_train_batch_end(self, *_: Any) -> None:
            marks.setdefault("first_step", time.monotonic())

    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    L.seed_everything(0, verbose=False)
    train, held_out = sums(0)
    model = smollm2(chosen)
    timeline = rft.TimelineCallback()
    L.Trainer(
        max_steps=1 + LATER,
        accelerator="auto",
        devices=1,
        precision=fast_precision("cuda" if torch.cuda.is_available() else "cpu"),
        gradient_clip_val=1.0,
        callbacks=[Watch(), rft.Synchronous(), timeline],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=out,
    ).fit(
        rft.RFTModule(model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0, fused=True)),
        rft.RFTDataModule(
            tasks=train,
            val_tasks=held_out,
            reward=last_number,
            explorers=explorers,
            tasks_per_step=4,
            samples_per_task=8,
            max_new_tokens=12,
        ),
    )
    first_push = min((span for span in timeline.spans if span.what == "sync"), key=lambda span: span.begin)
    marks["engine_ready"], marks["first_push"] = first_push.begin, first_push.end
    marks["first_rollout"] = max(span.end for span in timeline.spans if span.what == "rollout" and span.batch == 0)
    trains = sorted((span for span in timeline.spans if span.what == "train"), key=lambda span: span.begin)
    first, *later = [span.end - span.begin for span in trains]
    steps = {"train_first": first, "train_later": statistics.median(later)}
    seconds = {name: mark - began for name, mark in marks.items()}
    (out / "marks.json").write_text(json.dumps({"marks": seconds, "steps": steps}))


def once(model: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds from exec to each mark, in the order in which they are reached; and of training steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        command = [sys.executable, "-m", "benchmarks.startup", "--model", str(model), "--child", folder]
        with (out / "log").open("w+") as log:
            began = time.monotonic()  # the same clock in every process
            command.append(repr(began))
            if subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=False).returncode:
                log.seek(0)
                raise SystemExit(log.read()[-5000:])
        found: dict[str, dict[str, float]] = json.loads((out / "marks.json").read_text())
        return dict(sorted(found["marks"].items(), key=lambda mark: mark[1])), found["steps"]


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, default=MODEL, help="another model's folder; nothing is written then")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "BEGAN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), float(arguments.child[1]), arguments.model)
        return
    once(arguments.model)  # reads all files
    rounds, steps = zip(*(once(arguments.model) for _ in range(arguments.repeats)), strict=True)
    parts = [
        {name: mark - before for (name, mark), before in zip(marks.items(), [0.0, *marks.values()], strict=False)}
        for marks in rounds
    ]
    results: dict[str, float] = {
        "seconds_to_first_step": round(statistics.median(marks["first_step"] for marks in rounds), 2)
    }
    for name in parts[0]:
        results[f"{name}_s"] = round(statistics.median(part[name] for part in parts), 2)
    for name in ("train_first", "train_later"):
        results[f"{name}_s"] = round(statistics.median(step[name] for step in steps), 2)
    results["train_first_over_later"] = round(
        statistics.median(step["train_first"] / step["train_later"] for step in steps), 2
    )
    if arguments.model == MODEL:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "startup.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, value in results.items():
        print(f"{name:22} {value:6.2f}")
    print("rounds:", *(f"{marks['first_step']:.2f}" for marks in rounds))


if __name__ == "__main__":
    main()
