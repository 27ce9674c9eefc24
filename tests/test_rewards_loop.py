"""Rewards in whole runs: of a group, in parts, of turns, from the workflow; what is logged, and what is stored."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

import lightning_rft as rft
from tests.trainer_and_data import fake_data, quiet_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


# What explorers run is local, so that they need not import this file.


def logged(folder: str) -> list[dict[str, str]]:
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_sum_of_a_reward_of_all_and_an_async_one(tiny_model_path: Path, tmp_path: Path) -> None:
    def best_of_all(completions: list[str], tasks: list[rft.Task]) -> list[float]:
        longest = max(map(len, completions))
        return [float(len(completion) == longest) for completion in completions]

    async def length(completion: str, task: rft.Task) -> dict[str, float]:
        return {"letters": len(completion), "bonus": 1}

    reward = rft.RewardSum({"best": best_of_all, "length": length}, weights={"length": 0.0})
    data = fake_data(reward=reward, val_tasks=["1 + 1 ="] * 3, val_samples=2, tasks_per_step=2, samples_per_task=3)
    trainer = quiet_trainer(
        tmp_path, rft.Synchronous(), max_steps=2, limit_val_batches=1.0, val_check_interval=2, num_sanity_val_steps=0,
        logger=CSVLogger(tmp_path),
    )  # fmt: skip
    trainer.fit(rft.RFTModule(tiny_model_path), data)
    rows = logged(trainer.logger.log_dir)  # type: ignore[union-attr, arg-type]
    steps = [row for row in rows if row["rft/reward"]]
    assert len(steps) == 2
    for row in steps:
        assert float(row["rft/reward"]) == float(row["rft/reward_best"]) >= 1 / 3
        assert float(row["rft/reward_length"]) == float(row["rft/reward_length.letters"]) + 1 > 1
        assert float(row["rft/reward_length.bonus"]) == 1.0
    (row,) = (row for row in rows if row["val/reward"])
    assert float(row["val/reward"]) == float(row["val/reward_best"]) >= 0.5
    assert float(row["val/reward_length.bonus"]) == 1.0
    stored = list(rft.read_buffer(next(tmp_path.rglob("buffer.sqlite")), tokens=False))
    groups: dict[Any, list[float]] = {}
    for row in (row for row in stored if row["state"] == "trained"):
        parts = json.loads(row["rewards"])
        assert row["reward"] == parts["best"] and parts["length.letters"] == len(row["text"])
        groups.setdefault((row["batch"], row["slot"]), []).append(row["reward"])
    assert len(groups) == 4 and all(len(rewards) == 3 and max(rewards) == 1.0 for rewards in groups.values())


def test_a_workflow_that_knows_what_it_earned_and_credit_for_each_turn(tiny_model_path: Path, tmp_path: Path) -> None:
    async def plays(task: rft.Task, policy: rft.Policy) -> rft.Answer:
        replies = [await policy(f"{task.prompt} {turn}") for turn in range(2)]
        for reply in replies:
            reply.reward = float(len(reply) % 2)
        return rft.Answer(replies[-1], reward=len(replies[-1]), metrics={"reward": 5.0, "loss": 7.0})

    data = fake_data(workflow=plays, reward=None, tasks_per_step=2, samples_per_task=3)
    trainer = quiet_trainer(tmp_path, rft.Synchronous(), max_steps=2, logger=CSVLogger(tmp_path))
    trainer.fit(rft.RFTModule(tiny_model_path, objective=rft.GRPO(credit="turn")), data)
    steps = [row for row in logged(trainer.logger.log_dir) if row["rft/reward"]]  # type: ignore[union-attr, arg-type]
    for row in steps:
        # beside the metrics of the run, and not in their place
        assert (float(row["rft/workflow_reward"]), float(row["rft/workflow_loss"])) == (5.0, 7.0)
        assert float(row["rft/loss"]) != 7.0 and 0.0 < float(row["rft/workflow_turn_rewards"]) <= 2.0
        assert float(row["rft/workflow_drift"]) == 0.0
    for row in rft.read_buffer(next(tmp_path.rglob("buffer.sqlite")), tokens=False):
        if row["state"] == "trained":
            metrics = json.loads(row["metrics"])
            assert row["reward"] == len(row["text"]) + metrics["turn_rewards"]
            assert metrics.keys() == {"reward", "loss", "drift", "turn_rewards"}


def test_without_a_reward_the_workflow_must_be_the_users() -> None:
    for workflow in (None, rft.SingleTurn()):
        with pytest.raises(rft.ConfigurationError, match=r"reward is missing: .* returns Answer\(text, reward=...\)"):
            rft.RFTDataModule(["1"], workflow=workflow, engine=rft.FakeEngine())
