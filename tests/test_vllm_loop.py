"""The whole loop with the real engine: a token's version is what sampled it, and that is what the trainer trains.

Rule 3 holds for every strategy with either transport. Every version of the weights is kept, and every token that was
trained is computed again with the version that it says. A version that was not loaded whole, a cache of older weights,
or a swap in mid-generation that is off by one token shows in its log-prob.

All runs of a dtype share their explorers, since vLLM takes long to start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft
from tests.halfway_engines import HalfwayVLLMEngine
from tests.recomputed_tokens import run
from tests.trainer_and_data import fake_data, quiet_trainer

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
HALF = rft.Raw(0.5)


def made(bf16_units: bool, explorers: int, folder: Path) -> Iterator[rft.RFTDataModule]:
    engine = HalfwayVLLMEngine()
    engine.switch = folder / "wait"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_RFT_BF16", str(int(bf16_units)))  # decides the engine's dtype
        data = fake_data(
            tasks=[f"{i} + 1 =" for i in range(3 * STEPS)],
            val_tasks=["1 + 1 =", "2 + 2 ="],
            reward=lambda completion, task: float(sum(character.isalpha() for character in completion)),
            engine=engine,
            explorers=explorers,
            tasks_per_step=3,
            samples_per_task=3,
            max_new_tokens=60,
        )
        with data:
            yield data


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rft.RFTDataModule]:
    yield from made(False, 2, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rft.RFTDataModule]:
    yield from made(True, 1, tmp_path_factory.mktemp("engine"))


def halfway(data: rft.RFTDataModule, wait: bool) -> None:
    engine = data.engine
    assert isinstance(engine, HalfwayVLLMEngine)
    engine.switch.touch() if wait else engine.switch.unlink(missing_ok=True)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_token_is_of_the_version_that_it_says(
    name: str, transport: str, in_float32: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    strategy = STRATEGIES[name](TRANSPORTS[transport]())
    halfway(in_float32, strategy.in_flight)
    keep, gaps = run(strategy, in_float32, tiny_model_path, tmp_path, steps=STEPS)
    assert len(keep.turns) == 9 * STEPS
    assert max(gaps.own) <= SAME
    assert median(gaps.other) > OTHER, "one version more must show"
    assert bool(gaps.mixed) == strategy.in_flight, f"{gaps.mixed} turns of more than one version"


def test_a_swap_in_bfloat16(in_bfloat16: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    halfway(in_bfloat16, True)
    _, gaps = run(rft.FullyAsynchronous(max_staleness=3), in_bfloat16, tiny_model_path, tmp_path, steps=STEPS)
    assert gaps.mixed
    assert mean(gaps.kl) < 1e-2


@dataclass(frozen=True)
class Gap(rft.GRPO):
    """GRPO that reports the gap it sees, in every sample."""

    advantage: rft.Advantage = HALF
    gaps: list[float] = field(default_factory=list)
    skips_zero_advantage = False

    def token_loss(self, tokens: rft.TokenBatch) -> Any:
        self.gaps.append(float((tokens.logprobs.detach() - tokens.sampling_logprobs).abs().max()))
        return super().token_loss(tokens)


class Note(L.Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("peft_config", [None, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}])
@pytest.mark.parametrize("bf16_units", [False, True])
def test_vllm_samples_with_the_weights_that_are_trained(
    request: pytest.FixtureRequest, tiny_model_path: Path, tmp_path: Path, bf16_units: bool, peft_config: Any
) -> None:
    """Those of a whole model, or of one with an adapter."""
    if peft_config:
        pytest.importorskip("peft")
    data: rft.RFTDataModule = request.getfixturevalue("in_bfloat16" if bf16_units else "in_float32")
    halfway(data, False)
    objective, note = Gap(), Note()
    module = rft.RFTModule(tiny_model_path, objective, lambda p: torch.optim.AdamW(p, lr=3e-3), peft_config=peft_config)
    trainer = quiet_trainer(
        tmp_path, rft.Synchronous(), note, max_steps=4, limit_val_batches=None, val_check_interval=4
    )
    trainer.fit(module, data)
    assert trainer.global_step == trainer.callback_metrics["val/version"] == len(note.logged) == 4
    assert max(step["rft/kl"] for step in note.logged) < (1e-2 if bf16_units else 1e-6)
    assert (max(step["rft/push_gap"] for step in note.logged) > 1e-3) == bf16_units
    changed = [step["rft/weights_changed"] for step in note.logged]
    assert min(changed) > 0.1, "the weights must change visibly in the engine's dtype for this to mean anything"
    if bf16_units:
        assert min(objective.gaps) > 1e-3, "the engine computes in float32"
    else:
        assert max(objective.gaps) < SAME
