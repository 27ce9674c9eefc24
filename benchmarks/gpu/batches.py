"""The policy, and the shortcuts by which it is trained, without a trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.machine import Machine
from lightning_rft.experience import Turn
from lightning_rft.model_folder import Pretrained
from lightning_rft.trainer.loading import load_policy
from lightning_rft.trainer.shortcuts import FastPath, probe

__all__ = ["autocast", "fast_path", "policy", "sharing"]

_HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_ANY = 1e12  # a balance with which samples share rows whatever attention costs


def policy(machine: Machine, attention: str) -> Any:
    """The model as a trainer loads it, on the first GPU."""
    return load_policy(Pretrained.of(machine.model), attention).to(machine.device)


@contextlib.contextmanager
def autocast(machine: Machine, precision: str) -> Iterator[None]:
    """What ``Trainer(precision=...)`` does around a training step."""
    dtype = _HALF.get(precision)
    with contextlib.nullcontext() if dtype is None else torch.autocast(machine.device, dtype):
        yield


def fast_path(machine: Machine, model: Any, groups: list[list[Turn]], attention: str, precision: str) -> FastPath:
    """The shortcuts that the trainer would take."""
    with autocast(machine, precision):
        return probe(model, groups, attention)


def sharing(path: FastPath) -> FastPath:
    """The same, with rows that are shared wherever that is exact, although it may not pay."""
    return replace(path, balance=_ANY)
