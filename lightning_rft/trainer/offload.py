"""The trainer's half of taking turns on shared GPUs: what it puts aside while explorers explore."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_rft.errors import ScheduleError
from lightning_rft.trainer.precision import MasterWeights

__all__ = ["Offload", "Turn", "held_by"]


class Turn(Enum):
    """Whose turn it is on the GPUs that both sides share."""

    TRAINER = auto()
    EXPLORERS = auto()


class Offload:
    """Keeps the optimizer's state in pinned memory of the CPU, and frees gradients, while it is the explorers' turn.

    Tensors stay the objects that they are, and only what they hold moves: a checkpoint can be saved in either turn. The
    optimizer refuses to step in the explorers'. A sharded policy's state stays where it is, since saving it takes
    collectives on the GPUs.

    Args:
        trainer: Its optimizers, and its ``RFTModule``, which says whether the state moves.
        moved: Types of the devices that state is moved from.
    """

    def __init__(self, trainer: L.Trainer, moved: tuple[str, ...] = ("cuda",)) -> None:
        self._trainer = trainer
        self._moved = moved
        self._away: list[tuple[Tensor, torch.device]] = []
        self._pinned: dict[int, Tensor] = {}  # by the id of the tensor; slow to make, so kept
        self._refusals: list[Any] = []  # of steps, by each optimizer

    def take(self, turn: Turn, *, within_batch: bool = False) -> None:
        """Puts aside what the explorers' turn takes, or brings it back; gradients stay if it comes ``within_batch``."""
        if turn is Turn.EXPLORERS and not self._refusals:
            self._put_aside(within_batch)
        elif turn is Turn.TRAINER:
            self._bring_back()

    @torch.no_grad()
    def _put_aside(self, within_batch: bool) -> None:
        module: Any = self._trainer.lightning_module
        self._refusals = [each.register_step_pre_hook(_refuse) for each in self._trainer.optimizers]
        if module.offload_optimizer:
            state = (tensor for optimizer in self._trainer.optimizers for tensor in held_by(optimizer))
            self._away = [(tensor, tensor.device) for tensor in state if self._moves(tensor)]
        for tensor, device in self._away:
            host = self._pinned.get(id(tensor))
            if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
                host = torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")
                self._pinned[id(tensor)] = host
            host.copy_(tensor, non_blocking=True)
        self._synchronize()
        for tensor, _ in self._away:
            tensor.data = self._pinned[id(tensor)]
        if not within_batch:  # the next batch would zero them before its first micro-batch
            for parameter in module.parameters():
                parameter.grad = None
        if self._on_gpu:
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _bring_back(self) -> None:
        for tensor, device in self._away:
            tensor.data = torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)
        self._synchronize()
        for refusal in self._refusals:
            refusal.remove()
        self._away, self._refusals = [], []

    def close(self) -> None:
        """Lets optimizers step again, whose state stays where it is: the next fit moves it to its device."""
        for refusal in self._refusals:
            refusal.remove()
        self._away, self._refusals = [], []
        self._pinned.clear()

    def _moves(self, tensor: Tensor) -> bool:
        sharded = hasattr(tensor, "device_mesh")
        return tensor.dim() > 0 and tensor.device.type in self._moved and not sharded

    @property
    def _on_gpu(self) -> bool:
        return self._trainer.strategy.root_device.type == "cuda"

    def _synchronize(self) -> None:
        """Waits for copies, whose source is about to go."""
        if self._on_gpu:
            torch.cuda.synchronize(self._trainer.strategy.root_device)


def held_by(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yields what an optimizer holds beside the policy's own parameters."""
    if isinstance(optimizer, MasterWeights):
        yield from optimizer.masters
        optimizer = optimizer.inner
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _refuse(*_: Any) -> None:
    raise ScheduleError("an optimizer was to step while explorers have the GPUs that it shares with them")
