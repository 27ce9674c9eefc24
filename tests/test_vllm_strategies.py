"""Rule 3 for every strategy with either transport, on the real engine: a token's version is what sampled it.

Every version of the weights is kept, and every token that was trained is computed again with the version that it says.
A version that was not loaded whole, a cache of older weights, or a swap in mid-generation that is off by one token
shows in its log-prob.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft

pytestmark = [pytest.mark.vllm]
pytest.importorskip("vllm")

STEPS = 6
SAME, OTHER = 1e-3, 1e-2
STRATEGIES = {
    "a": lambda transport: rft.Synchronous(transport=transport),
    "b": lambda transport: rft.OneStepOffPolicy(transport=transport),
    "c": lambda transport: rft.FullyAsynchronous(max_staleness=3, transport=transport),
    "d": lambda transport: rft.MultiExplorerAsynchronous(max_staleness=3, transport=transport),
}
TRANSPORTS = {"collective": rft.CollectiveTransport, "checkpoint": rft.CheckpointTransport}


@pytest.fixture(scope="module")
def data() -> Iterator[rft.RFTDataModule]:
    with rft.RFTDataModule(
        tasks=[f"{i} + 1 =" for i in range(3 * STEPS)],
        reward=lambda completion, task: float(sum(character.isalpha() for character in completion)),
        engine=rft.VLLMEngine(dtype="float32"),
        explorers=2,
        tasks_per_step=3,
        samples_per_task=3,
        max_new_tokens=60,
    ) as data:
        yield data


class Keep(L.Callback):
    """Keeps what was trained, and the weights of every version."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.turns: list[rft.Turn] = []
        self.staleness: list[int] = []

    def keep(self, pl_module: Any) -> None:
        self.weights.append({name: tensor.detach().clone() for name, tensor in pl_module.weights()})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.keep(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for turn in (turn for group in batch.groups for one in group.experiences for turn in one.turns):
            self.turns.append(turn)
            self.staleness += [batch.batch - version for version in turn.versions]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.keep(pl_module)


def logprobs(policy: Any, weights: dict[str, torch.Tensor], turn: rft.Turn) -> torch.Tensor:
    policy.load_state_dict(weights)
    ids = torch.tensor([[*turn.prompt_ids, *turn.token_ids]])
    with torch.no_grad():
        logits = policy(input_ids=ids).logits[0, len(turn.prompt_ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(turn.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_token_is_of_the_version_that_it_says(
    name: str, transport: str, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    strategy = STRATEGIES[name](TRANSPORTS[transport]())
    keep = Keep()
    module = rft.RFTModule(tiny_model_path, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[keep, strategy],
        logger=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    assert trainer.global_step == STEPS
    assert 0 <= min(keep.staleness) <= max(keep.staleness) <= strategy.max_staleness
    assert len(keep.turns) == 9 * STEPS

    own, other, mixed = [], [], 0
    for turn in keep.turns:
        sampled, versions = torch.tensor(turn.logprobs), torch.tensor(turn.versions)
        mixed += len(versions.unique()) > 1
        for version in versions.unique().tolist():
            of_version = versions == version
            for number in (version, (version + 1) % len(keep.weights)):
                gap = (logprobs(module.policy, keep.weights[number], turn) - sampled)[of_version].abs().max()
                (own if number == version else other).append(float(gap))
    assert max(own) <= SAME
    assert sorted(other)[len(other) // 2] > OTHER, "one version more must show"
    assert bool(mixed) == strategy.in_flight, f"{mixed} turns of more than one version"
