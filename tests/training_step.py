"""A training step without Lightning's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_rft.experience import Group
from lightning_rft.trainer.loader import BatchPart
from lightning_rft.trainer.module import RFTModule


class Trainer:
    """What a training step asks of its trainer, which is also its strategy."""

    world_size = 1

    def __init__(self, module: RFTModule, accumulate_grad_batches: int) -> None:
        self.accumulate_grad_batches = accumulate_grad_batches
        self.optimizers = [torch.optim.SGD(module.parameters())]
        self.strategy = self
        self.micro_batches = accumulate_grad_batches

    def backward(self, loss: torch.Tensor, optimizer: None) -> None:
        self.micro_batches += 1
        loss.backward()


class SteppedModule(RFTModule):
    """Runs without Lightning's loop, and keeps what it logs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logged: dict[str, float] = {}
        self.configure_model()

    @property
    def trainer(self) -> Any:
        return self._stub

    def log(self, name: str, value: Any, **_: Any) -> None:  # type: ignore[override]
        self.logged[name] = float(value)

    def log_dict(self, values: Any, **_: Any) -> None:
        for name, value in values.items():
            self.log(name, value)

    def step(self, groups: Sequence[Group], parts: int = 1, max_tokens: int | None = None) -> torch.Tensor:
        """Gradient of all that is trained after one batch, as Lightning accumulates it."""
        self._stub = Trainer(self, parts)
        self.max_tokens_per_micro_batch = max_tokens
        for part in range(parts):
            batch = BatchPart(0, groups, part=part, parts=parts, max_new_tokens=64, on_policy=True)
            (self.training_step(batch, part) / parts).backward()
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.cat([parameter.grad.reshape(-1) for parameter in trained])  # type: ignore[union-attr]
