"""Strictly on-policy is strictly on-policy: explorer and trainer compute the same log-probs, in every step.

Each step of these runs moves log-probs by far more than the two may differ, so weights that are one step old show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_rft as rft
from lightning_rft.sync.transports.collective import CollectiveTransport
from tests.trainer_and_data import fake_data, pool_of, quiet_trainer, stored_data

SAME, STALE = 1e-4, 1e-2
STEPS = 4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data() -> Iterator[rft.RFTDataModule]:
    with fake_data(
        tasks=[f"{index} + {index} =" for index in range(3 * STEPS)],
        reward=lambda completion, task: float(sum(map(ord, completion)) % 7),
        engine=rft.TransformersEngine(dtype="float32", device="cpu"),
        tasks_per_step=3,
        samples_per_task=3,
        max_new_tokens=8,
        sampling=rft.Sampling(temperature=0.8),
    ) as data:
        yield data


@dataclass(frozen=True)
class Watched(rft.GRPO):
    """Keeps the largest difference between sampling and training log-probs of every micro-batch."""

    differences: list[float] = field(default_factory=list)

    def token_loss(self, tokens: rft.TokenBatch) -> Any:
        self.differences.append(float((tokens.logprobs.detach() - tokens.sampling_logprobs).abs().max()))
        return super().token_loss(tokens)


def differences(
    strategy: rft.SyncStrategy, data: rft.RFTDataModule, model: Path, folder: Path, accumulate: int = 1
) -> list[float]:
    objective = Watched()
    module = rft.RFTModule(
        model, objective=objective, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3)
    )
    trainer = quiet_trainer(folder, strategy, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, data)
    assert trainer.global_step == STEPS
    assert len(objective.differences) == STEPS * accumulate
    return objective.differences


@pytest.mark.parametrize("accumulate", [1, 2])
def test_explorer_and_trainer_agree_in_every_step(
    accumulate: int, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    assert max(differences(rft.Synchronous(), data, tiny_model_path, tmp_path, accumulate)) <= SAME


class TooEarly(rft.Synchronous):
    """Lets every batch but the first start one version early."""

    def admit(self, batch: int) -> int:
        return max(0, batch - 1)


class TooEarlyAndUnchecked(TooEarly):
    max_staleness = 1


class Yesterday(CollectiveTransport):
    """From a version on, sends the weights of the push before under the name of the new version."""

    def __init__(self, since: int = 0) -> None:
        super().__init__()
        self.since = since
        self.kept: Any = None

    def push(self, weights: Any, version: int, explorers: Any, to: Any = None) -> Any:
        new = weights.snapshot()
        old, self.kept = self.kept or new, new
        return super().push(old if version >= self.since else new, version, explorers, to)


def test_a_rollout_before_the_sync_is_seen(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    first, *others = differences(TooEarlyAndUnchecked(), data, tiny_model_path, tmp_path)
    assert first <= SAME
    assert min(others) > STALE


def test_old_weights_under_a_new_name_end_the_run(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(rft.AgreementError, match="after the push of version 1: log-probs differ by"):
        differences(rft.Synchronous(transport=Yesterday()), data, tiny_model_path, tmp_path)
    assert not pool_of(data).running


def test_old_weights_in_the_last_push_end_the_run(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    """Nothing is sampled with them, but a user would take what is sampled next for the trained policy's."""
    with pytest.raises(rft.AgreementError, match=f"after the push of version {STEPS}: log-probs differ by"):
        differences(rft.Synchronous(transport=Yesterday(since=STEPS)), data, tiny_model_path, tmp_path)


def test_old_weights_under_a_new_name_are_seen_in_the_tokens_too(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "tolerance", rft.Tolerance(push_gap=100.0))
    strategy = rft.Synchronous(transport=Yesterday())
    first, *others = differences(strategy, data, tiny_model_path, tmp_path)
    assert first <= SAME
    assert min(others) > STALE


def test_a_rollout_before_the_sync_is_refused(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"TooEarly.admit\(1\) is 0: .* staleness of 1 .* max_staleness=0"):
        differences(TooEarly(), data, tiny_model_path, tmp_path)
    assert not pool_of(data).running  # an error ends the explorers though they are held


def test_stored_experience_is_trained_at_the_temperatures_it_was_sampled_at(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "explored.sqlite"
    monkeypatch.setattr(data, "buffer", rft.Buffer(path))
    for temperature in (0.5, 1.3):
        monkeypatch.setattr(data, "sampling", replace(data.sampling, temperature=temperature))
        quiet_trainer(tmp_path, rft.Synchronous()).predict(rft.RFTModule(tiny_model_path), data)
    objective = Watched()
    module = rft.RFTModule(
        tiny_model_path, objective=objective, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    )
    quiet_trainer(tmp_path, max_epochs=1).fit(module, stored_data(path, tasks_per_step=6))
    assert len(objective.differences) == STEPS  # 24 groups of two runs, 6 in each batch
    assert max(objective.differences) < SAME
