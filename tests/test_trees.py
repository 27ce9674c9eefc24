"""Samples that are random trees of calls, through a whole run: every sampled token is trained exactly once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft
from tests.halfway_engines import HalfwayTransformersEngine
from tests.recomputed_tokens import Keep
from tests.trained_once import Recorded, check_logprobs, check_once, check_trees
from tests.trainer_and_data import fake_data, pool_of, quiet_trainer
from tests.wandering import wander

STEPS, SAME = 6, 1e-4

pytestmark = pytest.mark.usefixtures("one_thread")


class KillOnce(L.Callback):
    """Kills the explorer in the middle of the run."""

    def __init__(self, data: rft.RFTDataModule) -> None:
        self.data = data
        self.killed: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            for member in pool_of(self.data)._members.values():
                os.kill(member.process.pid, signal.SIGKILL)
                self.killed.append(member.process.pid)


@pytest.mark.parametrize("max_tokens", [None, 200])
def test_every_sampled_token_is_trained_once_with_its_own_version(
    tiny_model_path: Path, tmp_path: Path, max_tokens: int | None
) -> None:
    engine = HalfwayTransformersEngine(dtype="float32", device="cpu")
    engine.switch = tmp_path / "wait"
    engine.switch.touch()
    data = fake_data(
        tasks=[f"{index} + 1 =" for index in range(3 * STEPS)],
        reward=lambda completion, task: 1.0 + sum(map(ord, completion)) % 7,
        workflow=wander,
        explorers=rft.ExplorerPool(engine),
        tasks_per_step=3,
        samples_per_task=3,
        buffer=tmp_path / "buffer.sqlite",
    )
    keep, kill, objective = Keep(), KillOnce(data), Recorded()
    module = rft.RFTModule(
        tiny_model_path,
        objective=objective,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        max_tokens_per_micro_batch=max_tokens,
    )
    strategy = rft.FullyAsynchronous(max_staleness=3, in_flight=True)
    trainer = quiet_trainer(tmp_path, keep, strategy, kill, max_steps=STEPS)
    trainer.fit(module, data)
    assert len(kill.killed) == 1
    assert len(keep.samples) == 3 * 3 * STEPS

    check_trees(keep)
    check_once(keep, objective, tmp_path / "buffer.sqlite")
    check_logprobs(keep, module.policy, 3, SAME)
