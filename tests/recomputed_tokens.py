"""Keeps every version of the weights, to compute every trained token again with the version that it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_rft as rft
from tests.trainer_and_data import quiet_trainer


class Keep(L.Callback):
    """Keeps what was trained, and the weights of every version."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.samples: list[rft.Experience] = []
        self.turns: list[rft.Turn] = []
        self.staleness: list[int] = []

    def keep(self, pl_module: Any) -> None:
        self.weights.append({name: tensor.detach().clone() for name, tensor in pl_module.weights()})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.keep(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        samples = [sample for group in batch.groups for sample in group.experiences]
        self.samples += samples
        for turn in (turn for sample in samples for turn in sample.turns):
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


@dataclass
class Gaps:
    """Differences between log-probs that were sampled and those computed again, one of each turn and version.

    Args:
        own: With the weights of the version that the tokens say: the largest.
        other: With those of the version after: the largest.
        kl: The k3 estimate of KL(sampling, own), of every token.
        mixed: Turns that were sampled with more than one version.
    """

    own: list[float]
    other: list[float]
    kl: list[float]
    mixed: int


def run(
    strategy: rft.SyncStrategy, data: rft.RFTDataModule, model: Path, folder: Path, *, steps: int
) -> tuple[Keep, Gaps]:
    """Trains a tiny model at a rate at which every version shows, and looks at every token."""
    keep = Keep()
    module = rft.RFTModule(model, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    trainer = quiet_trainer(folder, keep, strategy, max_steps=steps)
    trainer.fit(module, data)
    assert trainer.global_step == steps
    assert 0 <= min(keep.staleness) <= max(keep.staleness) <= strategy.max_staleness
    gaps = Gaps([], [], [], 0)
    for turn in keep.turns:
        sampled, versions = torch.tensor(turn.logprobs), torch.tensor(turn.versions)
        assert bool((versions.diff() >= 0).all())
        gaps.mixed += len(versions.unique()) > 1
        for version in versions.unique().tolist():
            here = versions == version
            own = (logprobs(module.policy, keep.weights[version], turn) - sampled)[here]
            after = (logprobs(module.policy, keep.weights[(version + 1) % len(keep.weights)], turn) - sampled)[here]
            gaps.own.append(float(own.abs().max()))
            gaps.other.append(float(after.abs().max()))
            gaps.kl += (own.exp() - 1 - own).tolist()
    return keep, gaps
