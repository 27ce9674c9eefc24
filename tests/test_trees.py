"""Samples that are random trees of calls, through a whole run: every sampled token is trained exactly once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.packing import pack
from tests.halfway_engines import HalfwayTransformersEngine
from tests.recomputed_tokens import Keep, logprobs
from tests.trainer_and_data import fake_data, pool_of, quiet_trainer

STEPS, SAME = 6, 1e-4

pytestmark = pytest.mark.usefixtures("one_thread")


async def wander(task: rft.Task, policy: rft.Policy) -> str:
    """Goes on, forks, calls twice at the same time, compacts and begins anew, as the task's id decides."""
    draw = random.Random(task.id)
    conversations = [[{"role": "user", "content": str(task.prompt)}]]

    async def call(messages: Sequence[dict[str, Any]], length: int) -> rft.Reply:
        reply = await policy(messages, max_new_tokens=length)
        conversations.append([*messages, reply.message])
        return reply

    reply = await call(conversations[0], 12)
    for step in range(draw.randint(1, 3)):
        asked = {"role": "user", "content": f"{step}?"}
        messages = draw.choice(conversations)
        match draw.choice(["turn", "together", "compact", "text"]):
            case "turn":
                reply = await call([*conversations[-1], asked], 10)
            case "together":
                reply, _ = await asyncio.gather(call([*messages, asked], 9), call([*messages, asked, asked], 9))
            case "compact":
                reply = await call([{"role": "system", "content": f"After {len(messages)}"}, asked], 8)
            case "text":
                reply = await policy(f"{task.prompt}{step}", max_new_tokens=8)
    return reply


@dataclass(frozen=True)
class Recorded(rft.REINFORCE):
    """Keeps the log-probs that each trained token was sampled with."""

    trained: list[float] = field(default_factory=list, hash=False)

    def token_loss(self, tokens: rft.TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.trained.extend(tokens.sampling_logprobs.tolist())
        return super().token_loss(tokens)


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

    # exactly once: what the loss was given, and what the buffer says was trained, is every token of the batches
    sampled = Counter(logprob for turn in keep.turns for logprob in turn.logprobs.tolist())
    assert Counter(objective.trained) == sampled
    stored = [row for row in rft.read_buffer(tmp_path / "buffer.sqlite") if row["state"] == "trained"]
    assert len(stored) == 3 * 3 * STEPS and sum(row["num_tokens"] for row in stored) == sampled.total()
    # with its own version and log-prob
    for turn in keep.turns:
        versions = torch.tensor(turn.versions)
        for version in versions.unique().tolist():
            alone = logprobs(module.policy, keep.weights[version], turn)
            assert (alone - torch.tensor(turn.logprobs))[versions == version].abs().max() < SAME
    assert any(len(turn.version_runs) > 1 for turn in keep.turns), "no weights were swapped in mid-generation"
    parents = Counter((id(sample), turn.parent) for sample in keep.samples for turn in sample.turns)
    assert any(parent is not None and count > 1 for (_, parent), count in parents.items()), "no forks"
    # rows say of each call what the call alone says
    module.policy.load_state_dict(keep.weights[-1])
    groups = [[turn for sample in keep.samples[first : first + 3] for turn in sample.turns] for first in (0, 3, 6)]
    alone = torch.cat([logprobs(module.policy, keep.weights[-1], turn) for group in groups for turn in group])
    for shared in (False, True):
        packed = pack(groups, shared=shared)
        assert len(packed.input_ids) < sum(map(len, groups))
        with torch.no_grad():
            in_rows, _ = token_logprobs(module.policy, packed)
        assert (in_rows - alone).abs().max() < SAME
