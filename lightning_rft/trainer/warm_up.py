"""What a first step does besides training, done while explorers start: shortcuts are tried, and Adam's state is made.

Of a first step's 13 seconds of processor time (SmolLM2-135M in float32, four groups of eight answers), later ones need
8.5. The probe takes 3.7 of the rest, touching the memory of Adam's state 0.6, other memory and kernels 0.4: a made-up
forward and backward pass would save these, at a cost of 2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lightning_rft.experience import Turn
from lightning_rft.trainer.precision import MasterWeights
from lightning_rft.trainer.shortcuts import longest, probe, random_groups

__all__ = ["Texts", "make_state", "warm_up"]

_COLUMNS = 1024
_WORK = 1.5e11  # parameters times columns: two seconds of two cores
_LAZY = torch.optim.Adam, torch.optim.AdamW  # which make their state in their first step


@dataclass(frozen=True)
class Texts:
    """Tokens of the texts of a group, and how many there are of them."""

    prompt: int
    completion: int
    samples: int

    def within(self, columns: int) -> Texts:
        """Texts that together have no more columns, if each has one.

        Example:
            >>> Texts(prompt=300, completion=4096, samples=8).within(1024)
            Texts(prompt=256, completion=96, samples=8)
        """
        prompt = max(1, min(self.prompt, columns // 4))
        samples = max(1, min(self.samples, columns - prompt))
        completion = max(1, min(self.completion, (columns - prompt) // samples))
        return Texts(prompt, completion, samples)

    def turns(self, model: Any) -> list[list[Turn]]:
        """Such a group, of random tokens."""
        return random_groups(model, self.prompt, self.completion, self.samples)


def warm_up(module: Any, texts: Texts) -> Iterator[Callable[[], None]]:
    """Yields pieces of a first step's work, which change no weights, gradients or random numbers.

    What Adam remembers of gradients is made, as zeros, if there is none yet.
    """
    if module.fast_path is None:
        yield partial(_try, module, texts)
    for optimizer in module.trainer.optimizers:
        yield partial(make_state, optimizer)


def _try(module: Any, texts: Texts) -> None:
    """Tries the shortcuts with made-up texts, no more of them than takes a second or two."""
    model = module.policy
    parameters = sum(parameter.numel() for parameter in model.parameters())
    turns = texts.within(min(_COLUMNS, int(_WORK / parameters))).turns(model)
    with module.trainer.precision_plugin.forward_context():
        path = probe(model, turns, model.config._attn_implementation)
    module.fast_path = replace(path, tried=longest(turns))


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the state that Adam would make, and find to be zero, in its first step."""
    if isinstance(optimizer, MasterWeights):
        optimizer = optimizer.inner
    if type(optimizer) not in _LAZY or optimizer.state:
        return
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        first = group["params"][0]
        one = torch.zeros(1, dtype=first.dtype, device=first.device, requires_grad=True)
        one.grad = torch.zeros_like(one)
        make: Any = type(optimizer)
        other = make([{**group, "params": [one]}])
        other.step()
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                name: torch.zeros_like(parameter if value.shape == one.shape else value)
                for name, value in other.state[one].items()
            }
