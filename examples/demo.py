"""The main job: teach SmolLM2-135M-Instruct to add, with vLLM as explorer, on two CPU cores and without a network.

    make demo                         # everything, installation included
    python examples/demo.py --seed 1  # again, with another seed

Writes logs, a learning curve, summary.json and the trained model to runs/demo.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before the slow imports, because seconds_to_first_step counts them

import argparse  # noqa: E402
import csv  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import lightning_rft as rft  # noqa: E402


def command_line() -> argparse.Namespace:
    """What the user chose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder that takes the results")
    return parser.parse_args()


# Trainer and explorer take turns on the same cores; threads that spin while they wait would be in each other's way.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

explorers = rft.ExplorerPool(rft.VLLMEngine())
if __name__ == "__main__":
    arguments = command_line()
    explorers.launch(arguments.out / "explorers")  # they import vLLM while this process imports Lightning
    print("Importing vLLM in the explorer, and Lightning here ...", flush=True)

import lightning as L  # noqa: E402
import torch  # noqa: E402
from convert_smollm2 import smollm2  # noqa: E402
from lightning.pytorch.callbacks import Callback, TQDMProgressBar  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402

from lightning_rft.hardware import fast_precision  # noqa: E402
from lightning_rft.rewards import last_number  # noqa: E402
from lightning_rft.tasks.sources import reasoning_gym_tasks  # noqa: E402

HELD_OUT = 100
LARGEST = 20  # of the two numbers that are added
SHOWN = 3


def sums(seed: int) -> tuple[list[rft.Task], list[rft.Task]]:
    """Sums of two numbers up to 20 from reasoning-gym: some to train on, and 100 others to test on."""
    generated = reasoning_gym_tasks("chain_sum", size=40_000, seed=seed, min_terms=2, max_terms=2, max_digits=2)
    by_question: dict[str, rft.Task] = {}
    for task in generated:
        first, operator, second = task.metadata["expression"].split()
        if operator == "+" and max(int(first), int(second)) <= LARGEST:
            asked = f"What is {first}+{second}? Answer with a number."
            by_question[asked] = rft.Task([{"role": "user", "content": asked}], answer=task.answer)
    tasks = list(by_question.values())
    random.Random(seed).shuffle(tasks)
    held_out, train = tasks[:HELD_OUT], tasks[HELD_OUT:]
    assert not {asked_in(task) for task in held_out} & {asked_in(task) for task in train}, (
        "held-out tasks are trained on"
    )
    return train, held_out


def asked_in(task: rft.Task) -> str:
    """The text of a task's question."""
    return str(task.prompt[0]["content"])  # type: ignore[index]


class Watch(Callback):
    """Keeps the answers of the last validation, and the times of the training steps."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.steps: list[float] = []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Keeps each answer under its task's id."""
        self.answers |= {group.task_id: group.experiences[0].text for group in batch.groups}

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes the time."""
        self.steps.append(time.perf_counter() - STARTED)


def main(arguments: argparse.Namespace) -> None:
    """Runs the demo and writes what came of it."""
    leave_the_terminal_to_the_progress_bar()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    L.seed_everything(arguments.seed, verbose=False)
    model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))
    train, held_out = sums(arguments.seed)
    print(f"{model.name} learns to add: {len(train)} sums to train on, {len(held_out)} others to test on.")

    module = rft.RFTModule(
        model, optimizer=lambda p: torch.optim.AdamW(p, lr=arguments.lr, weight_decay=0.0, fused=True)
    )
    data = rft.RFTDataModule(
        tasks=train,
        val_tasks=held_out,
        reward=last_number,
        explorers=explorers,
        tasks_per_step=4,
        samples_per_task=8,
        max_new_tokens=12,
    )
    watch = Watch()
    csv_logger = CSVLogger(out, name="logs")
    trainer = L.Trainer(
        max_steps=arguments.steps,
        accelerator="auto",
        devices=1,
        precision=fast_precision("cuda" if torch.cuda.is_available() else "cpu"),
        gradient_clip_val=1.0,
        callbacks=[watch, rft.Synchronous(), TQDMProgressBar()],
        logger=[csv_logger, TensorBoardLogger(out, name="logs", version=csv_logger.version)],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=10**9,  # the demo validates by itself, before and after
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    with data:  # one set of explorers for all three
        trainer.fit(module, data)
        after = trainer.validate(module, data, verbose=False)[0]["val/pass@1"]
        answers_after, watch.answers = watch.answers, {}
        # the untrained model comes last, only so that training starts at once
        before = trainer.validate(rft.RFTModule(model), data, verbose=False)[0]["val/pass@1"]
    module.save_pretrained(out / "model")

    logs = Path(csv_logger.log_dir)
    rewards, kl = column(logs / "metrics.csv", "rft/reward"), column(logs / "metrics.csv", "rft/kl")
    summary = {
        "accuracy_before": before,
        "accuracy_after": after,
        "reward_first10": statistics.fmean(rewards[:10]),
        "reward_last10": statistics.fmean(rewards[-10:]),
        "seconds_to_first_step": watch.steps[0],
        "seconds_per_step": statistics.median(b - a for a, b in zip(watch.steps, watch.steps[1:], strict=False)),
        "seconds_total": time.perf_counter() - STARTED,
        "steps": len(watch.steps),
        "held_out_tasks": len(held_out),
        "training_tasks": len(train),
        "kl_max": max(kl),
        "seed": arguments.seed,
    }
    summary = {name: value if isinstance(value, int) else float(f"{value:.4g}") for name, value in summary.items()}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw(rewards, before, after, out / "learning_curve.png")

    print(
        f"\nGreedy accuracy on {len(held_out)} held-out sums: {before:.2f} before, {after:.2f} after"
        f" {len(rewards)} steps."
    )
    for index, task in enumerate(held_out[:SHOWN]):
        print(
            f"  {asked_in(task)}\n    before: {watch.answers[str(index)]!r}\n    after:  {answers_after[str(index)]!r}"
        )
    print(
        f"Mean reward {summary['reward_first10']:.2f} in the first 10 steps,"
        f" {summary['reward_last10']:.2f} in the last 10."
    )
    print(
        f"{summary['seconds_total']:.0f} s in all: the first step after {summary['seconds_to_first_step']:.0f} s, then "
        f"{summary['seconds_per_step']:.1f} s each."
    )
    print(f"Curve: {out / 'learning_curve.png'}   summary: {out / 'summary.json'}   model: {out / 'model'}")
    print(f"Logs: {logs} (explorers' own in {out / 'explorers'}); tensorboard --logdir {out / 'logs'}")


def leave_the_terminal_to_the_progress_bar() -> None:
    """Silences what Lightning and transformers say at every start, and a deprecation inside Lightning."""
    from transformers.utils import logging as transformers_logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def column(path: Path, name: str) -> list[float]:
    """A column of the CSV log, rows without a value left out."""
    with path.open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def draw(rewards: list[float], before: float, after: float, path: Path) -> None:
    """The learning curve: reward of every step, its running mean, and held-out accuracy at both ends."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    steps = range(1, len(rewards) + 1)
    running = [statistics.fmean(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, rewards, color="#a8ddb5", marker=".", linewidth=1, label="reward of the step (sampled)")
    axes.plot(steps, running, color="#238b45", linewidth=2.5, label="mean of the last 5 steps")
    axes.plot([0, len(rewards)], [before, after], "o", color="#08519c", markersize=9, label="greedy accuracy, held-out")
    for x, y, side in ((0, before, "left"), (len(rewards), after, "right")):
        axes.annotate(f"{y:.2f}", (x, y), (0, -16), textcoords="offset points", ha=side, color="#08519c", weight="bold")
    axes.set(xlabel="step", ylabel="share of correct answers", ylim=(-0.03, 1.05), title="SmolLM2-135M learns to add")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(arguments)
