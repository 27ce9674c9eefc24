"""Helpers for optimizers under every precision: scaled gradients, gradient norms, and weights in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from typing_extensions import override

from lightning_rft.errors import ConfigurationError

__all__ = ["MasterWeights", "grad_norm", "leave_unscaling_to_the_plugin", "optimizer_for", "zero_gradient"]

_SLICE = 1 << 26  # elements; their gradients take 256 MiB in float32
_Pair = tuple[Tensor, Tensor]  # a parameter and its master, which is itself if it is in float32


def optimizer_for(
    parameters: Iterable[Tensor], optimizer: OptimizerCallable, *, sharded: bool
) -> torch.optim.Optimizer:
    """Makes an optimizer of what is trained that loses no small step: of masters, where it is in half precision.

    Raises:
        ConfigurationError: They are in half precision, and sharded.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if all(parameter.dtype == torch.float32 for parameter in parameters):
        return optimizer(parameters)
    if sharded:
        raise ConfigurationError(
            "ModelParallelStrategy with weights in half precision would lose small updates: set "
            "Trainer(precision='bf16-mixed') in place of 'bf16-true'"
        )
    return MasterWeights(parameters, optimizer)


def leave_unscaling_to_the_plugin(optimizer: torch.optim.Optimizer) -> None:
    """Has the precision plugin, not a fused optimizer's own kernel, divide gradients by the scale of 16-mixed.

    A fused optimizer offers to do so inside its step. Gradients are then still scaled when they are clipped, so
    Lightning refuses ``gradient_clip_val`` with every fused optimizer, even under bf16-mixed, where nothing is scaled.
    With the offer withdrawn the scaler unscales before the step, as for every other optimizer.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def zero_gradient(parameters: Iterable[Tensor]) -> Tensor:
    """A zero whose gradient is zero in every parameter, so that the optimizer counts a step without any work."""
    return torch.stack([p.reshape(-1)[0] for p in parameters if p.requires_grad]).sum() * 0.0


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients as one vector, [] in float32; all ranks of a sharded model must call it together."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:  # a training step that returned no loss
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class MasterWeights(torch.optim.Optimizer):
    """Steps float32 copies of half-precision parameters, and rounds the copies to the parameters after each step.

    A bfloat16 weight cannot change by less than 1/256 of itself, so the small steps of fine-tuning would be lost. The
    copies and the optimizer's state take as much memory as for a model in float32; their gradients exist for some
    parameters at a time, if the optimizer is one of ``torch.optim``. ``optimizer`` makes the optimizer that steps the
    copies.

    Example::

        MasterWeights(model.parameters(), lambda p: torch.optim.AdamW(p, lr=1e-6))
    """

    def __init__(self, parameters: Iterable[Tensor], optimizer: OptimizerCallable) -> None:
        pairs = [(p, p if p.dtype == torch.float32 else p.detach().float().requires_grad_()) for p in parameters]
        self.inner: torch.optim.Optimizer = optimizer([master for _, master in pairs])
        parameter_of = {id(master): parameter for parameter, master in pairs}
        groups = [
            {**group, "params": [parameter_of[id(master)] for master in group["params"]]}
            for group in self.inner.param_groups
        ]
        super().__init__(groups, {})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _copy_settings(self, self.inner)
        pairs = self._pairs()
        gradients = [parameter.grad for parameter, _ in pairs]
        for _, master in pairs:
            master.grad = None  # which an optimizer passes over
        for part in _slices([master.numel() for _, master in pairs], _SLICE if _steps_alone(self.inner) else None):
            for (_, master), gradient in zip(pairs[part], gradients[part], strict=True):
                master.grad = None if gradient is None else gradient.float()
            self.inner.step()
            for parameter, master in pairs[part]:
                master.grad = None
                if parameter is not master:
                    parameter.copy_(master)
        for (parameter, _), gradient in zip(pairs, gradients, strict=True):
            parameter.grad = gradient
        return loss

    @property
    def masters(self) -> list[Tensor]:
        """The copies."""
        return [master for _, master in self._copied()]

    @override
    def state_dict(self) -> dict[str, Any]:
        _copy_settings(self, self.inner)
        return {"optimizer": self.inner.state_dict(), "masters": [master.detach() for master in self.masters]}

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["optimizer"])
        _copy_settings(self.inner, self)
        for (parameter, master), saved in zip(self._copied(), state_dict["masters"], strict=True):
            master.copy_(saved)
            parameter.copy_(master)

    def _pairs(self) -> list[_Pair]:
        groups = zip(self.param_groups, self.inner.param_groups, strict=True)
        return [pair for ours, inner in groups for pair in zip(ours["params"], inner["params"], strict=True)]

    def _copied(self) -> list[_Pair]:
        return [(parameter, master) for parameter, master in self._pairs() if parameter is not master]


def _steps_alone(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it steps each parameter by that one's state alone; others may count steps in their groups, say."""
    return type(optimizer).__module__.split(".")[:2] == ["torch", "optim"] and type(optimizer) is not torch.optim.LBFGS


def _slices(sizes: list[int], limit: int | None) -> Iterator[slice]:
    """Runs of at most ``limit`` elements in all, or of one that is larger; everything without a limit.

    Example:
        >>> list(_slices([3, 1, 1, 9, 1], limit=4))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    start, room = 0, limit
    for index, size in enumerate(sizes):
        if room is not None and limit is not None:
            if size > room and index > start:
                yield slice(start, index)
                start, room = index, limit
            room -= size
    yield slice(start, len(sizes))


def _copy_settings(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Copies learning rates and the like: a scheduler sets those of the outer optimizer, a checkpoint of the inner."""
    for ours, theirs in zip(source.param_groups, target.param_groups, strict=True):
        theirs.update({name: value for name, value in ours.items() if name != "params"})
