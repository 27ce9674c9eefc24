"""Mixtures and curricula in real runs, in which a resumed one goes on as if it had never stopped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from tests.trainer_and_data import quiet_trainer, seeded_data

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Endless:
    def __iter__(self) -> Any:
        return iter([f"{i} - 1 =" for i in range(20)])


def tasks() -> rft.Mixture:
    sums = [{"question": f"{i} + 1 =", "level": i % 3} for i in range(6)]
    return rft.Mixture(
        {
            "sums": rft.TaskSet(sums, curriculum=rft.ByPassRate(pass_threshold=3.0)),
            "sorted": rft.TaskSet(sums, curriculum=rft.ByDifficulty("level")),
            "stream": Endless(),
        },
        weights={"sums": 2, "sorted": 1, "stream": 1},
        steps_per_epoch=3,
    )


def test_a_resumed_run_goes_on_exactly(tmp_path: Path, tiny_model_path: Path) -> None:
    data = seeded_data(tasks=tasks(), tasks_per_step=4, buffer=rft.Buffer(group_filter=rft.has_signal))

    def train(name: str, steps: int, resume: Path | None = None) -> tuple[list[list[str]], dict[str, torch.Tensor]]:
        checkpoints = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = quiet_trainer(tmp_path / name, rft.Synchronous(), checkpoints, max_steps=steps, max_epochs=-1)
        module = rft.RFTModule(tiny_model_path)
        trainer.fit(module, data, ckpt_path=resume)
        with Ledger.open(tmp_path / name / "rft" / "buffer.sqlite") as ledger:
            tasks = ledger.trained_tasks()
        # which group of a batch got which task in place of a refused one depends on who came back first
        return [sorted(tasks[at : at + 4]) for at in range(0, len(tasks), 4)], dict(module.state_dict())

    with data:
        whole, weights = train("whole", 9)
        for half in (4, 6):
            train(f"half-{half}", half)
            checkpoint = tmp_path / f"half-{half}" / "checkpoints" / f"step={half}.ckpt"
            batches, resumed = train(f"half-{half}", 9, checkpoint)
            assert batches == whole
            assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    assert len(whole) == 9
    # but for a few that have no signal
    shares = Counter(task.split("/")[0] for batch in whole for task in batch)
    assert shares.keys() == {"sums", "sorted", "stream"} and shares["sums"] > shares["sorted"]
