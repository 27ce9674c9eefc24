"""The whole loop with the real engine: what vLLM samples with is what the trainer trains, after every push."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft
from tests.trainer_and_data import SUMS, fake_data, quiet_trainer

pytestmark = [pytest.mark.vllm]
pytest.importorskip("vllm")

STEPS = 4


HALF = rft.Raw(0.5)


@dataclass(frozen=True)
class Gap(rft.GRPO):
    """GRPO that reports the gap it sees, in every sample."""

    advantage: rft.Advantage = HALF
    gaps: list[float] = field(default_factory=list)
    skips_zero_advantage = False

    def token_loss(self, tokens: rft.TokenBatch) -> Any:
        self.gaps.append(float((tokens.logprobs.detach() - tokens.sampling_logprobs).abs().max()))
        return super().token_loss(tokens)


def letters(completion: str, task: rft.Task) -> float:
    return sum(character.isalpha() for character in completion) / 8


@pytest.mark.parametrize(("bf16_units", "gap"), [(False, 1e-3), (True, None)])
def test_vllm_samples_with_the_weights_that_are_trained(
    tiny_model_path: Path, tmp_path: Path, bf16_units: bool, gap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_RFT_BF16", str(int(bf16_units)))  # decides the engine's dtype
    objective = Gap()
    kls: list[float] = []
    changed: list[float] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            kls.append(float(trainer.callback_metrics["rft/kl"]))
            changed.append(float(trainer.callback_metrics["rft/weights_changed"]))

    module = rft.RFTModule(tiny_model_path, objective=objective, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    data = fake_data(
        tasks=SUMS[:8],
        val_tasks=["1 + 1 =", "2 + 2 ="],
        reward=letters,
        engine=rft.VLLMEngine(),
        tasks_per_step=2,
        samples_per_task=4,
        max_new_tokens=8,
    )
    trainer = quiet_trainer(tmp_path, rft.Synchronous(), Note(), max_steps=STEPS, limit_val_batches=None)
    trainer.fit(module, data)
    assert trainer.global_step == STEPS
    assert trainer.callback_metrics["val/version"] == STEPS
    assert len(kls) == STEPS
    assert max(kls) < 1e-2
    assert min(changed) > 0.1, "the weights must change visibly in the engine's dtype for this to mean anything"
    if gap is not None:
        assert max(objective.gaps) < gap
    else:
        assert min(objective.gaps) > 1e-3, "the engine computes in float32"
