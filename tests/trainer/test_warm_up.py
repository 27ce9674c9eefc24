"""What is done before the first step changes nothing but what that step takes."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft
from lightning_rft.trainer import shortcuts
from lightning_rft.trainer import warm_up as warm_ups
from lightning_rft.trainer.precision import MasterWeights
from lightning_rft.trainer.shortcuts import settled
from lightning_rft.trainer.warm_up import Texts, make_state, warm_up
from tests.trainer.test_module import GROUPS, make_group
from tests.trainer.test_precision import Batches
from tests.trainer_and_data import quiet_trainer
from tests.training_step import SteppedModule

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = Texts(prompt=9, completion=40, samples=3)  # no shorter than those of GROUPS

ADAMS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True, amsgrad=True),
    "two groups": lambda p: torch.optim.Adam(
        [{"params": p[:2]}, {"params": p[2:], "lr": 0.1}, {"params": []}], lr=1e-3
    ),
}
OTHERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, dampening=0.5),
}


class WarmsUp(L.Callback):
    """Does so when training starts, and sees that nothing has changed."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, rft.RFTModule)
        policy: Any = pl_module.policy
        before = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        modes = [module.training for module in policy.modules()]
        generators = torch.get_rng_state(), random.getstate()
        gradients = [parameter.grad for parameter in policy.parameters()]
        pieces = list(warm_up(pl_module, TEXTS))
        for piece in pieces:
            piece()
        assert len(pieces) == 2
        assert all(torch.equal(tensor, before[name]) for name, tensor in pl_module.state_dict().items())
        assert [module.training for module in policy.modules()] == modes
        assert torch.equal(torch.get_rng_state(), generators[0])
        assert random.getstate() == generators[1]
        assert all(
            parameter.grad is gradient for parameter, gradient in zip(policy.parameters(), gradients, strict=True)
        )
        assert trainer.global_step == 0
        assert not trainer.callback_metrics


def trained(path: Path, precision: str, optimizer: Any, *callbacks: L.Callback, **settings: Any) -> dict[str, Any]:
    """What is left after three steps, dropout and all."""

    class Module(rft.RFTModule):
        def on_train_start(self) -> None:
            super().on_train_start()
            for part in self.policy.modules():  # type: ignore[union-attr]
                if hasattr(part, "attention_dropout"):
                    part.attention_dropout = 0.2
            self.policy.train()  # type: ignore[union-attr]

    L.seed_everything(3, verbose=False)
    module = Module(path, optimizer=optimizer, **settings)
    trainer = quiet_trainer(".", *callbacks, max_steps=3, precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, train_dataloaders=Batches(GROUPS, 3))
    (made,) = trainer.optimizers
    return {
        "weights": module.state_dict(),
        "state": made.state_dict(),
        "path": module.fast_path,
        "random": torch.get_rng_state(),
        "logged": {name: trainer.callback_metrics[name] for name in ("rft/loss", "rft/grad_norm")},
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [*((name, "32-true") for name in ADAMS | OTHERS), ("fused", "bf16-mixed"), ("fused", "bf16-true")],
)
def test_training_is_what_it_would_be_without(optimizer: str, precision: str, tiny_model_path: Path) -> None:
    make = (ADAMS | OTHERS)[optimizer]
    cold = trained(tiny_model_path, precision, make)
    warm = trained(tiny_model_path, precision, make, WarmsUp())
    for what, found in cold.items():
        assert same(found, warm[what]), what


def test_an_adapter_and_checkpointed_layers(tiny_model_path: Path) -> None:
    pytest.importorskip("peft")
    settings = {"peft_config": {"r": 2, "target_modules": "all-linear"}, "gradient_checkpointing": True}
    cold = trained(tiny_model_path, "32-true", ADAMS["fused"], **settings)
    warm = trained(tiny_model_path, "32-true", ADAMS["fused"], WarmsUp(), **settings)
    for what, found in cold.items():
        assert same(found, warm[what]), what


@pytest.mark.parametrize("optimizer", ADAMS)
def test_adams_state_is_what_a_first_step_finds(optimizer: str) -> None:
    shaped = torch.ones(2, 3).t(), torch.ones(4), torch.ones(1)
    parameters = [torch.nn.Parameter(values) for values in shaped]
    made, other = (ADAMS[optimizer](parameters) for _ in range(2))
    make_state(made)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in other.param_groups:
        group["lr"] = 0.0  # a step without a gradient, which leaves zeros
        group["weight_decay"] = 0.0
    other.step()
    for state in other.state.values():
        state["step"] -= 1
    for parameter in parameters:
        assert same(made.state[parameter], dict(other.state[parameter]))
        assert all(
            made.state[parameter][name].stride() == tensor.stride() for name, tensor in other.state[parameter].items()
        )


def test_what_adam_knows_is_kept_and_others_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    adam = ADAMS["fused"]([parameter])
    adam.step()
    before = {name: tensor.clone() for name, tensor in adam.state[parameter].items()}
    make_state(adam)
    assert same(before, dict(adam.state[parameter]))
    for make in OTHERS.values():
        make_state(other := make([parameter]))
        assert not other.state
    half = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    make_state(masters := MasterWeights([half], ADAMS["fused"]))
    (state,) = masters.inner.state.values()
    assert state["exp_avg"].dtype == torch.float32


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Groups of turns that the shortcuts were tried with."""
    made, probe = [], shortcuts.probe

    def recorded(model: Any, turns: Any, *rest: Any) -> Any:
        made.append(turns)
        return probe(model, turns, *rest)

    for module in (shortcuts, warm_ups):
        monkeypatch.setattr(module, "probe", recorded)
    return made


def test_shortcuts_are_tried_once_unless_with_shorter_texts(tiny_model_path: Path, probes: list[Any]) -> None:
    cold = SteppedModule(tiny_model_path)
    cold.step(GROUPS)
    assert len(probes) == 1
    for texts, more in ((TEXTS, 0), (Texts(prompt=9, completion=4, samples=3), 1)):
        module = SteppedModule(tiny_model_path)
        module._stub = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=torch.no_grad))  # type: ignore[assignment]
        warm_ups._try(module, texts)
        probes.clear()
        for longest in (40, 80):  # only the first batch counts
            module.step([*GROUPS, make_group(9, (0, 1), longest)])
            assert len(probes) == more
        assert module.fast_path == cold.fast_path


def test_a_batch_settles_what_was_tried(tiny_model_path: Path, probes: list[Any]) -> None:
    module = SteppedModule(tiny_model_path)
    path = settled(None, module.policy, [])
    assert path.tried is None
    assert settled(path, module.policy, GROUPS) is path
    assert len(probes) == 1


def test_the_work_is_bounded() -> None:
    for texts in (Texts(4000, 16000, 64), Texts(1, 1, 1), Texts(20, 12, 8), Texts(20, 12, 2000)):
        for columns in (1024, 30, 1):
            cut = texts.within(columns)
            assert min(cut.prompt, cut.completion, cut.samples) >= 1
            assert cut.prompt + cut.samples * cut.completion <= max(columns, 2)
            assert cut.prompt <= texts.prompt and cut.completion <= texts.completion and cut.samples <= texts.samples
    assert Texts(45, 12, 8).within(1024) == Texts(45, 12, 8)
