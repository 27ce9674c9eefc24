"""The main job: teach SmolLM2-135M-Instruct to add, with vLLM as explorer, on two CPU cores and no network.

    make demo                         # everything, installation included
    python examples/demo.py --seed 1  # again, with another seed

Writes metrics, a learning curve and summary.json to runs/demo, and the trained model to runs/demo/model.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before the slow imports: seconds_to_first_step counts them

import argparse  # noqa: E402
import csv  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning as L  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402

import lightning_rft as rft  # noqa: E402
from lightning_rft.hardware import bf16_is_fast  # noqa: E402
from lightning_rft.rewards import last_number  # noqa: E402
from lightning_rft.tasks import reasoning_gym_tasks  # noqa: E402

HELD_OUT = 100
LARGEST = 20  # of the two numbers


def sums(seed: int) -> tuple[list[rft.Task], list[rft.Task]]:
    """Sums of two numbers up to 20 from reasoning-gym: what to train on, and 100 others to test on."""
    generated = reasoning_gym_tasks("chain_sum", size=12_000, seed=seed, min_terms=2, max_terms=2, max_digits=2)
    questions: dict[str, rft.Task] = {}
    for task in generated:
        first, operator, second = task.metadata["expression"].split()
        if operator == "+" and max(int(first), int(second)) <= LARGEST:
            text = f"What is {first}+{second}? Answer with a number."
            questions[text] = rft.Task([{"role": "user", "content": text}], answer=task.answer)
    tasks = list(questions.values())
    held_out, train = tasks[:HELD_OUT], tasks[HELD_OUT:]
    texts = {question(task) for task in train}
    assert not any(question(task) in texts for task in held_out), "a held-out question is among the training tasks"
    return train, held_out


def question(task: rft.Task) -> str:
    """What the user says."""
    return task.prompt[0]["content"]


class Answers(Callback):
    """Keeps the answers of the last validation, and the time of the first training step."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.first_step: float | None = None

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Keeps each answer under its task's id."""
        self.texts |= {group.task_id: group.experiences[0].text for group in batch}

    def on_train_batch_end(self, *_: Any) -> None:
        """Stops the clock at the first step."""
        if self.first_step is None:
            self.first_step = time.perf_counter() - STARTED


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    quiet()
    L.seed_everything(arguments.seed, verbose=False)
    from convert_smollm2 import smollm2

    model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))
    started = STARTED if arguments.steps else time.perf_counter()
    train, held_out = sums(arguments.seed)

    module = rft.RFTModule(model, optimizer=lambda p: torch.optim.AdamW(p, lr=arguments.lr, weight_decay=0.0, fused=True))
    data = rft.RFTDataModule(
        tasks=train,
        val_tasks=held_out,
        reward=last_number,
        engine=rft.VLLMEngine(),
        tasks_per_step=4,
        samples_per_task=8,
        max_new_tokens=12,
    )
    answers = Answers()
    arguments.out.mkdir(parents=True, exist_ok=True)
    loggers = [CSVLogger(arguments.out, name="logs"), TensorBoardLogger(arguments.out, name="logs", version=None)]
    trainer = L.Trainer(
        max_steps=arguments.steps,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() or bf16_is_fast() else "32-true",
        gradient_clip_val=1.0,
        callbacks=[rft.Synchronous(), answers],
        logger=loggers,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=0 if False else 1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=arguments.out,
    )
    with data:  # one set of explorers for all three
        before = trainer.validate(module, data, verbose=False)[0]["val/pass@1"]
        answers_before = dict(answers.texts)
        trainer.fit(module, data)
        after = trainer.validate(module, data, verbose=False)[0]["val/pass@1"]
    print(before, after, answers_before, answers.texts, answers.first_step, time.perf_counter() - started)


def quiet() -> None:
    """Leaves the terminal to the progress bar."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
