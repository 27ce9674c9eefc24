"""Nothing that is not finite reaches an optimizer, and whatever finite reward a user gives trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.trainer.objectives.advantages import relative
from tests.trainer_and_data import quiet_trainer, stored_data
from tests.training_step import SteppedModule

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = 4


def write_buffer(
    path: Path, rewards: Callable[[int], Sequence[float]], logprob: Callable[[int], float] = lambda batch: -3.6
) -> Path:
    """A buffer with a group for each of some batches, whose rewards and log-probs are functions of the batch."""
    generator = torch.Generator().manual_seed(0)
    with Ledger.open(path) as ledger:
        ledger.begin()
        for batch in range(BATCHES):
            key = GroupKey(batch, 0)
            ledger.issue(key, str(batch), epoch=0, explorer=0)
            samples = []
            for sample, reward in enumerate(rewards(batch)):
                ids = torch.randint(3, 40, (6,), generator=generator).tolist()
                turn = Turn((5, 6, 7), tuple(ids), (logprob(batch),) * 6, (0,) * 6, "stop")
                samples.append(Experience(str(batch), sample, (turn,), reward))
            ledger.ready(Group(key, str(batch), tuple(samples)))
    return path


class Steps(L.Callback):
    """Notes weights, optimizer state and what is logged after every batch."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.states: list[list[torch.Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step >= len(self.weights):
            self._note(trainer, pl_module)
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def _note(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights.append(torch.cat([p.detach().float().reshape(-1) for p in pl_module.parameters()]))
        (optimizer,) = trainer.optimizers
        state = getattr(optimizer, "inner", optimizer).state
        self.states.append([t.clone() for one in state.values() for t in one.values()])

    @property
    def stood(self) -> list[bool]:
        """Of each batch whether it left the weights as they were."""
        return [torch.equal(a, b) for a, b in zip(self.weights, self.weights[1:], strict=False)]


def fit(model: Path, buffer: Path, module: type[rft.RFTModule] = rft.RFTModule, **settings: Any) -> Steps:
    steps = Steps()
    data = stored_data(rft.Buffer(buffer, shuffle=False), tasks_per_step=1)
    trainer = quiet_trainer(buffer.parent, steps, **{"devices": 1, "max_epochs": 1} | settings)
    trainer.fit(module(model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)), data)
    return steps


# Rewards


@pytest.mark.parametrize("scale", [1e-300, 1e-3, 1.0, 1e39, 1e300, 1.7e308])
def test_advantages_do_not_depend_on_the_scale_of_rewards(scale: float) -> None:
    rewards = torch.tensor([0.0, 1.0, 0.5, -1.0], dtype=torch.float64)
    groups = torch.zeros(4, dtype=torch.long)

    def group_relative(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        return relative(rewards, groups, groups, eps=0.0)

    plain = group_relative(rewards, groups)
    assert torch.allclose(group_relative(rewards * scale, groups), plain, rtol=1e-12)
    beside = group_relative(torch.cat([rewards * scale, rewards]), torch.tensor([0] * 4 + [1] * 4))
    assert torch.equal(beside[4:], plain), "one group's rewards are no matter of another's"


@pytest.mark.parametrize("reward", [1e39, 1e300, -1.7e308])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_every_finite_reward_trains(reward: float, precision: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    buffer = write_buffer(tmp_path / "buffer.sqlite", lambda batch: (0.0, 1.0, reward if batch == 1 else 2.0))
    steps = fit(tiny_model_path, buffer, precision=precision)
    assert steps.stood == [False] * BATCHES
    assert all(torch.isfinite(weights).all() for weights in steps.weights)
    assert [logged["rft/skipped_steps"] for logged in steps.logged] == [0.0] * BATCHES
    assert all(math.isfinite(logged["rft/loss"]) for logged in steps.logged)
    assert not any(math.isnan(value) for logged in steps.logged for value in logged.values())


# Odd batches


def sample(number: int, logprob: float = -4.8, tokens: int = 4, reward: float | None = None) -> Experience:
    turn = Turn((5, 6), (7 + number,) * tokens, (logprob,) * tokens, (0,) * tokens, "stop")
    return Experience("0", number, (turn,), float(number) if reward is None else reward)


ODD = {
    "equal rewards": [sample(0, reward=1.0), sample(1, reward=1.0)],
    "one survivor": [sample(0, reward=1.0)],
    "an empty completion": [sample(0), sample(1, tokens=0)],
    "nothing but empty completions": [sample(0, tokens=0), sample(1, tokens=0)],
    "a log-ratio of 50": [sample(0), sample(1, logprob=-55.0), sample(2, logprob=-55.0, reward=-1.0)],
    "a log-ratio of -50": [sample(0, logprob=45.0), sample(1), sample(2, logprob=45.0)],
}
PRESETS = [rft.GRPO, rft.DrGRPO, rft.DAPO, rft.GSPO, rft.CISPO, rft.SAPO, rft.VESPO, rft.RLOO, rft.REINFORCE]
PRESETS += [rft.REINFORCEPlusPlus, rft.OPMD, rft.AsymRE, rft.TOPR]


@pytest.fixture(scope="module")
def stepped(tiny_model_path: Path) -> SteppedModule:
    return SteppedModule(tiny_model_path)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
@pytest.mark.parametrize("correction", [None, rft.Truncated(level="product")], ids=["ratio", "correction"])
def test_gradients_of_odd_batches_are_finite(
    preset: type[rft.Objective], correction: rft.Correction | None, stepped: SteppedModule
) -> None:
    stepped.objective = preset(correction=correction)
    for odd, samples in ODD.items():
        gradient = stepped.step([Group(GroupKey(0, 0), "0", tuple(samples))])
        assert gradient.isfinite().all(), odd
        assert math.isfinite(stepped.logged["rft/loss"]), odd


@pytest.mark.parametrize("objective", [rft.GRPO(), rft.GSPO(correction=None), rft.TOPR()], ids=repr)
def test_a_log_prob_that_is_not_a_number_is_not_trained_on(
    objective: rft.Objective, tiny_model_path: Path, tmp_path: Path
) -> None:
    class Module(rft.RFTModule):
        def __init__(self, model: Path, **settings: Any) -> None:
            super().__init__(model, objective, **settings)

    buffer = write_buffer(
        tmp_path / "buffer.sqlite", lambda _: (0.0, 1.0, 2.0), lambda batch: math.nan if batch == 1 else -3.6
    )
    steps = fit(tiny_model_path, buffer, Module)
    assert steps.stood == [False, True, False, False]
    assert all(torch.isfinite(weights).all() for weights in steps.weights)
    assert [logged["rft/skipped_steps"] for logged in steps.logged] == [0.0, 1.0, 1.0, 1.0]


# Steps


class Poisoned(rft.RFTModule):
    """What is computed from the second batch is not finite."""

    bad: tuple[int, ...] = (1,)
    loss_only = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.poison = batch.batch in self.bad
        return super().training_step(batch, batch_idx)

    def _loss(self, turns: Any, version: int) -> torch.Tensor:
        loss = super()._loss(turns, version)
        if not self.poison or not turns:
            return loss
        return loss + math.inf if self.loss_only else loss * math.nan


class PoisonedLoss(Poisoned):
    """Its gradient is finite."""

    loss_only = True


@pytest.mark.parametrize("module", [Poisoned, PoisonedLoss])
@pytest.mark.parametrize("settings", [
    {},
    {"accumulate_grad_batches": 2},
    {"gradient_clip_val": 0.1},
    {"precision": "bf16-true"},
    {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
], ids=str)  # fmt: skip
def test_a_step_that_is_not_finite_is_skipped(
    module: type[rft.RFTModule], settings: dict[str, Any], tiny_model_path: Path, tmp_path: Path
) -> None:
    buffer = write_buffer(tmp_path / "buffer.sqlite", lambda batch: (0.0, 1.0, 3.0))
    steps = fit(tiny_model_path, buffer, module, **settings)
    assert steps.stood == [False, True, False, False]
    assert all(torch.equal(a, b) for a, b in zip(steps.states[1], steps.states[2], strict=True))
    assert torch.isfinite(steps.weights[-1]).all()
    assert [logged["rft/skipped_steps"] for logged in steps.logged] == [0.0, 1.0, 1.0, 1.0]


def test_a_run_that_only_skips_ends(tiny_model_path: Path, tmp_path: Path) -> None:
    class Lost(Poisoned):
        bad = tuple(range(1, 100))

    buffer = write_buffer(tmp_path / "buffer.sqlite", lambda batch: (0.0, 1.0, 3.0))
    with pytest.raises(rft.NonFiniteError, match=r"5 batches in a row, up to batch 5, .* the loss and the norm of"):
        fit(tiny_model_path, buffer, Lost, max_epochs=9)


def test_one_good_step_in_between_begins_the_count_anew(tiny_model_path: Path, tmp_path: Path) -> None:
    class Seldom(Poisoned):
        bad = tuple(batch for batch in range(16) if batch % 5)

    buffer = write_buffer(tmp_path / "buffer.sqlite", lambda batch: (0.0, 1.0, 3.0))
    assert fit(tiny_model_path, buffer, Seldom, max_epochs=4).logged[-1]["rft/skipped_steps"] == 12.0


def scaled(scale: float) -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]}


def test_an_overflow_is_the_scalers_own_affair(tiny_model_path: Path, tmp_path: Path) -> None:
    buffer = write_buffer(tmp_path / "buffer.sqlite", lambda batch: (0.0, 1.0, 3.0))
    steps = fit(tiny_model_path, buffer, **scaled(2.0**60), max_epochs=4)
    assert steps.stood == [True] * 16
    assert steps.logged[-1]["rft/skipped_steps"] == 16.0


@pytest.mark.parametrize("module", [Poisoned, PoisonedLoss])
def test_no_scale_helps_against_a_loss_that_is_not_finite(
    module: type[Poisoned], tiny_model_path: Path, tmp_path: Path
) -> None:
    buffer = write_buffer(tmp_path / "buffer.sqlite", lambda batch: (0.0, 1.0, 3.0))
    assert fit(tiny_model_path, buffer, module, **scaled(1.0)).stood == [False, True, False, False]
    lost = type("Lost", (module,), {"bad": tuple(range(1, 100))})
    with pytest.raises(rft.NonFiniteError, match="up to batch 5"):
        fit(tiny_model_path, buffer, lost, **scaled(2.0**10), max_epochs=9)
