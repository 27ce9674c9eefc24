"""What the trainer puts aside in the explorers' turn: the optimizer's state, byte for byte, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_rft.errors import ScheduleError
from lightning_rft.trainer.offload import Offload, Turn, held_by
from lightning_rft.trainer.precision import MasterWeights

Optimizer = Callable[..., torch.optim.Optimizer]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


def trainer_of(optimizer: Optimizer, dtype: torch.dtype, *, offloads: bool = True) -> Any:
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3, dtype=dtype)
    module.offload_optimizer = offloads  # type: ignore[assignment]
    return SimpleNamespace(
        lightning_module=module,
        optimizers=[optimizer(list(module.parameters()))],
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def step(trainer: Any) -> None:
    trainer.optimizers[0].zero_grad()
    inputs = torch.arange(8.0, dtype=trainer.lightning_module.weight.dtype).reshape(2, 4)
    trainer.lightning_module(inputs).square().mean().backward()
    trainer.optimizers[0].step()


OPTIMIZERS = [
    pytest.param(adamw, torch.float32, id="adamw"),
    pytest.param(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.float32, id="sgd"),
    pytest.param(lambda p: MasterWeights(p, adamw), torch.bfloat16, id="masters"),
]


@pytest.mark.parametrize(("optimizer", "dtype"), OPTIMIZERS)
def test_training_is_as_if_nothing_had_moved(optimizer: Optimizer, dtype: torch.dtype) -> None:
    stays, moves = trainer_of(optimizer, dtype), trainer_of(optimizer, dtype)
    offload = Offload(moves, moved=("cpu",))
    offload.take(Turn.EXPLORERS)  # before there is any state
    offload.take(Turn.TRAINER)
    for _ in range(3):
        step(stays)
        step(moves)
        held = [tensor for tensor in held_by(moves.optimizers[0]) if tensor.dim()]
        assert held
        places = [tensor.data_ptr() for tensor in held]
        offload.take(Turn.EXPLORERS)
        offload.take(Turn.EXPLORERS)  # once more changes nothing
        assert not {tensor.data_ptr() for tensor in held} & set(places)
        saved = moves.optimizers[0].state_dict()
        torch.testing.assert_close(saved, stays.optimizers[0].state_dict(), rtol=0, atol=0)
        assert all(parameter.grad is None for parameter in moves.lightning_module.parameters())
        away = [tensor.data_ptr() for tensor in held]
        offload.take(Turn.TRAINER)
        assert not {tensor.data_ptr() for tensor in held} & set(away)
    for ours, theirs in zip(stays.lightning_module.parameters(), moves.lightning_module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_pinned_memory_is_taken_once() -> None:
    trainer = trainer_of(adamw, torch.float32)
    offload = Offload(trainer, moved=("cpu",))
    places = []
    for _ in range(2):
        step(trainer)
        offload.take(Turn.EXPLORERS)
        places.append([tensor.data_ptr() for tensor in held_by(trainer.optimizers[0]) if tensor.dim()])
        offload.take(Turn.TRAINER)
    assert places[0] == places[1]


def test_no_step_in_the_explorers_turn() -> None:
    trainer = trainer_of(adamw, torch.float32)
    offload = Offload(trainer)
    offload.take(Turn.EXPLORERS)
    with pytest.raises(ScheduleError, match="explorers have the GPUs"):
        step(trainer)
    offload.take(Turn.TRAINER)
    step(trainer)


def test_a_run_that_is_over_refuses_no_step() -> None:
    """The optimizer may be the user's own, and step in the next fit, of which another offload knows."""
    stays, moves = trainer_of(adamw, torch.float32), trainer_of(adamw, torch.float32)
    offload = Offload(moves, moved=("cpu",))
    step(stays)
    step(moves)
    offload.take(Turn.EXPLORERS)
    offload.close()
    step(stays)
    step(moves)
    assert torch.equal(stays.lightning_module.weight, moves.lightning_module.weight)


def test_what_stays() -> None:
    trainer = trainer_of(adamw, torch.float32, offloads=False)
    step(trainer)
    held = [tensor for tensor in held_by(trainer.optimizers[0]) if tensor.dim()]
    places = [tensor.data_ptr() for tensor in held]
    gradients = [parameter.grad for parameter in trainer.lightning_module.parameters()]
    Offload(trainer, moved=("cpu",)).take(Turn.EXPLORERS, within_batch=True)  # as the user set it
    assert [tensor.data_ptr() for tensor in held] == places
    assert [parameter.grad for parameter in trainer.lightning_module.parameters()] == gradients  # half of a batch's
    trainer.lightning_module.offload_optimizer = True
    held[0].device_mesh = "of a shard"
    Offload(trainer, moved=("cpu",)).take(Turn.EXPLORERS)
    assert [tensor.data_ptr() == place for tensor, place in zip(held, places, strict=True)] == [
        True, *[False] * (len(held) - 1)
    ]  # fmt: skip
