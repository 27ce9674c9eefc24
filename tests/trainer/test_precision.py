"""The precisions that Lightning offers, and gradient checkpointing, train the same policy."""

import copy
import math
import warnings

import lightning as L
import pytest
import torch

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group
from lightning_rft.trainer import precision
from lightning_rft.trainer.loader import BatchPart
from lightning_rft.trainer.module import RFTModule
from lightning_rft.trainer.objectives.grpo import GRPO
from lightning_rft.trainer.objectives.surrogates import Clip
from lightning_rft.trainer.precision import MasterWeights, grad_norm
from tests.trainer.test_module import GROUPS, close
from tests.trainer_and_data import quiet_trainer
from tests.training_step import SteppedModule as Module

# few tokens are near a border of its clipping range, across which rounding would move them
SMOOTH = GRPO(surrogate=Clip(dual=None), correction=None, normalisation="token")

pytestmark = pytest.mark.usefixtures("one_thread")


class Batches:
    """The same batch again and again."""

    def __init__(self, groups: list[Group], steps: int) -> None:
        self.groups, self.steps = groups, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        for step in range(self.steps):
            yield BatchPart(step, self.groups, on_policy=True)


def train(module: RFTModule, precision: str, steps: int = 4, **settings) -> L.Trainer:
    trainer = quiet_trainer(".", max_steps=steps, precision=precision, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, train_dataloaders=Batches(GROUPS, steps))
    return trainer


def test_the_norm_of_no_gradient_is_zero():
    assert grad_norm([torch.nn.Parameter(torch.ones(2))]) == 0


def flat(module: RFTModule) -> torch.Tensor:
    return torch.cat([parameter.detach().float().reshape(-1) for parameter in module.parameters()])


def sgd(lr: float):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_takes_the_steps_of_float32(precision, tiny_model_path):
    start = Module(tiny_model_path)
    ways = []
    for way in ("32-true", precision):
        module = RFTModule(tiny_model_path, SMOOTH, sgd(1.0))
        trainer = train(module, way)
        assert math.isfinite(float(trainer.callback_metrics["rft/loss"]))
        ways.append(flat(module) - flat(start))
    assert (ways[1] - ways[0]).norm() < 0.25 * ways[0].norm()


def test_bf16_true_keeps_float32_weights_for_the_optimizer(tiny_model_path):
    """Steps that are too small for bfloat16 add up."""
    module = RFTModule(tiny_model_path, optimizer=sgd(1e-3))
    trainer = train(module, "bf16-true", steps=3)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, MasterWeights)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    moved, seen = 0, 0
    for parameter, master in zip(module.parameters(), optimizer.inner.param_groups[0]["params"], strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), parameter)
        seen += master.numel()
        moved += int((master != parameter).sum())
    assert moved > seen / 2


def test_rotary_frequencies_are_not_rounded(tiny_model_path):
    module = Module(tiny_model_path)
    before = {name: buffer.clone() for name, buffer in module.policy.named_buffers()}
    assert before
    module.to(torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    for name, buffer in module.policy.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    module.to("meta")
    assert {buffer.device.type for _, buffer in module.policy.named_buffers()} == {"meta"}


def test_gradients_are_clipped_under_bf16_true(tiny_model_path):
    start = Module(tiny_model_path).to(torch.bfloat16)
    module = RFTModule(tiny_model_path, SMOOTH, sgd(1.0))
    trainer = train(module, "bf16-true", steps=1, gradient_clip_val=1e-3)
    masters = torch.cat([p.detach().reshape(-1) for p in trainer.optimizers[0].inner.param_groups[0]["params"]])
    assert (masters - flat(start)).norm() == pytest.approx(1e-3, rel=0.02)


def test_gradient_checkpointing_changes_no_gradient(tiny_model_path):
    plain, saving = Module(tiny_model_path), Module(tiny_model_path, gradient_checkpointing=True)
    calls = []
    for module in (plain, saving):
        module.policy.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        module.step(GROUPS)  # tries the model, once
    calls.clear()
    expected = plain.step(GROUPS)
    assert len(calls) == 1
    assert close(saving.step(GROUPS), expected)
    assert len(calls) == 3  # once more in backward


def test_sharded_weights_in_half_precision_are_refused(tiny_model_path):
    module = Module(tiny_model_path)
    module._device_mesh = object()
    module.configure_optimizers()
    module.bfloat16()
    with pytest.raises(ConfigurationError, match="in place of 'bf16-true'"):
        module.configure_optimizers()


# The optimizer alone


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def half_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).bfloat16()


def step(model, optimizer, seed, scheduler=None):
    optimizer.zero_grad()
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).bfloat16()
    model(inputs).square().sum().backward()
    optimizer.step()
    if scheduler:
        scheduler.step()


def test_masters_take_the_steps_of_the_optimizer_on_float32():
    model = half_model()
    reference = [p.detach().float().requires_grad_() for p in model.parameters()]
    alone, optimizer = adamw(reference), MasterWeights(model.parameters(), adamw)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (alone, optimizer)]
    for seed in range(5):
        step(model, optimizer, seed, schedulers[1])
        for p, q in zip(model.parameters(), reference, strict=True):
            q.grad = p.grad.float()
        alone.step()
        schedulers[0].step()
    for p, q in zip(model.parameters(), reference, strict=True):
        assert torch.equal(p, q.bfloat16())


def test_masters_go_on_exactly_from_a_state_dict():
    model = half_model()
    optimizer = MasterWeights(model.parameters(), adamw)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for seed in range(3):
        step(model, optimizer, seed, scheduler)
    restored = half_model()
    again = MasterWeights(restored.parameters(), adamw)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a file would be
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 1e-3
    for seed in range(3, 40):
        step(model, optimizer, seed)
        step(restored, again, seed)
    for p, q in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(p, q)


def test_float32_parameters_are_stepped_themselves():
    model = half_model()
    model[0].float()
    optimizer = MasterWeights(model.parameters(), adamw)
    assert optimizer.inner.param_groups[0]["params"][0] is model[0].weight
    assert optimizer.inner.param_groups[0]["params"][2] is not model[1].weight


@pytest.mark.parametrize("optimizer", [adamw, torch.optim.SGD, torch.optim.Adafactor])
def test_float32_gradients_exist_for_a_slice_at_a_time_and_change_no_step(optimizer, monkeypatch):
    whole, sliced = half_model(), half_model()
    for model in (whole, sliced):
        model[1].float()  # which is stepped itself, in its turn
    at_once, in_slices = (MasterWeights(model.parameters(), optimizer) for model in (whole, sliced))
    masters = [master for group in in_slices.inner.param_groups for master in group["params"]]
    held = []
    count = lambda *_: held.append([m.grad.numel() for m in masters if m.grad is not None])  # noqa: E731
    in_slices.inner.register_step_pre_hook(count)
    for seed in range(3):
        for model, one, limit in ((whole, at_once, None), (sliced, in_slices, 21)):
            monkeypatch.setattr(precision, "_SLICE", limit)
            inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).bfloat16()
            one.zero_grad()
            model[1](model[0](inputs).float()).square().sum().backward()
            before = [p.grad for p in model.parameters()]
            one.step()
            assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert held == [[35], [7], [21], [3]] * 3
    for p, q in zip(whole.parameters(), sliced.parameters(), strict=True):
        assert torch.equal(p, q)


class Counts(torch.optim.SGD):
    """Keeps a count of steps for a whole group, as some optimizers of other packages do."""

    def step(self, closure=None):
        self.param_groups[0]["steps"] = self.param_groups[0].get("steps", 0) + 1
        super().step(closure)


def test_an_optimizer_that_may_look_at_all_parameters_steps_all_at_once(monkeypatch):
    monkeypatch.setattr(precision, "_SLICE", 1)
    model = half_model()
    optimizer = MasterWeights(model.parameters(), Counts)
    step(model, optimizer, seed=0)
    assert optimizer.inner.param_groups[0]["steps"] == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_holds_16_bytes_a_parameter(precision, tiny_model_path):
    """As docs/memory.md says of one GPU: weights, gradients and the optimizer's two states."""
    module = RFTModule(tiny_model_path, optimizer=adamw)
    (optimizer,) = train(module, precision, steps=1).optimizers
    inner = optimizer.inner if precision == "bf16-true" else optimizer
    held = [tensor for state in inner.state.values() for tensor in state.values() if tensor.numel() > 1]
    held += [tensor for group in inner.param_groups for tensor in group["params"]]
    for parameter in module.parameters():
        held += [parameter, parameter.grad]
    held += [tensor.grad for tensor in held if tensor.is_leaf and tensor.grad is not None]
    size = sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())
    assert size == 16 * sum(parameter.numel() for parameter in module.parameters())
