"""Helpers for optimizers under every precision: scaled gradients, gradient norms, and weights in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from typing_extensions import override

__all__ = ["MasterWeights", "grad_norm", "leave_unscaling_to_the_plugin"]


def leave_unscaling_to_the_plugin(optimizer: torch.optim.Optimizer) -> None:
    """Has the precision plugin, not a fused optimizer's own kernel, divide gradients by the scale of 16-mixed.

    A fused optimizer offers to do so inside its step. Gradients are then still scaled when they are clipped, so
    Lightning refuses ``gradient_clip_val`` with every fused optimizer, even under bf16-mixed, where nothing is scaled.
    With the offer withdrawn the scaler unscales before the step, as for every other optimizer.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


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
    copies and the optimizer's state take as much memory as for a model in float32. ``optimizer`` makes the optimizer
    that steps the copies.

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
        for parameter, master in self._copied():
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.inner.step()
        for parameter, master in self._copied():
            parameter.copy_(master)
            master.grad = None
        return loss

    @override
    def state_dict(self) -> dict[str, Any]:
        _copy_settings(self, self.inner)
        return {"optimizer": self.inner.state_dict(), "masters": [master.detach() for _, master in self._copied()]}

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["optimizer"])
        _copy_settings(self.inner, self)
        for (parameter, master), saved in zip(self._copied(), state_dict["masters"], strict=True):
            master.copy_(saved)
            parameter.copy_(master)

    def _copied(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.param_groups, self.inner.param_groups, strict=True)
        return [
            (parameter, master)
            for ours, inner in pairs
            for parameter, master in zip(ours["params"], inner["params"], strict=True)
            if parameter is not master
        ]


def _copy_settings(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Copies learning rates and the like: a scheduler sets those of the outer optimizer, a checkpoint of the inner."""
    for ours, theirs in zip(source.param_groups, target.param_groups, strict=True):
        theirs.update({name: value for name, value in ours.items() if name != "params"})
