"""The policy's weights, whole, a few at a time: what a push streams, and what a model folder is written from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_rft.experience import TensorInfo
from lightning_rft.model_folder import checkpoint_weights
from lightning_rft.trainer.lora import adapted, base_state, merged
from lightning_rft.trainer.sharding import whole

__all__ = ["Gathering"]

_LAYER = re.compile(r"^.*?\.\d+\.")


@dataclass(frozen=True)
class _Part:
    """What is gathered at a time: names of the state without aliases, and of the checkpoint where only they differ."""

    names: list[str]
    renamed: list[str] | None


class Gathering:
    """Knows a policy's weights under the names and in the shapes of its checkpoint, and gathers them.

    An adapter's part is added to a weight when that is gathered.
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self._parts: list[_Part] = []
        self._manifest: list[TensorInfo] = []
        #: The names of those that training changes.
        self.trained: set[str] = set()
        state, layers = base_state(policy), adapted(policy)
        shapes = _shapes(state)
        first: dict[int, tuple[str, Tensor]] = {}  # by identity, which a tensor has only while it lives
        seen: set[int] = set()
        for part in _cut(policy, shapes):
            named = {name: shapes[name] for name in part}
            fresh = [name for name in part if id(shapes[name]) not in seen]
            seen.update(id(shapes[name]) for name in fresh)
            converted = checkpoint_weights(policy, named)
            for name, tensor in converted.items():
                same_as, _ = first.setdefault(id(tensor), (name, tensor))
                kind = str(tensor.dtype).removeprefix("torch.")
                self._manifest.append(TensorInfo(name, kind, tuple(tensor.shape), None if same_as == name else same_as))
            if any(name in layers or state[name].requires_grad for name in part):
                self.trained.update(converted)
            called = {id(tensor): name for name, tensor in reversed(converted.items())}
            only_renamed = all(id(tensor) in called for tensor in named.values())
            self._parts.append(_Part(fresh, [called[id(shapes[name])] for name in fresh] if only_renamed else None))

    def manifest(self, dtype: str | None = None) -> list[TensorInfo]:
        """Everything there is in the order of :meth:`tensors`, aliases of tied weights included."""
        return [
            info._replace(dtype=dtype) if dtype and getattr(torch, info.dtype).is_floating_point else info
            for info in self._manifest
        ]

    def tensors(self, dtype: str | None) -> Iterator[tuple[str, Tensor]]:
        """Yields every weight but aliases; sharded ones are cast, and then gathered by all ranks together.

        They are gathered when they are asked for, and not kept. Others stay as they are: who copies them casts them.
        """
        state, layers = base_state(self.policy), adapted(self.policy)
        cast = getattr(torch, dtype) if dtype else None

        def taken(name: str) -> Tensor:
            if name in layers:
                return merged(layers[name], cast)
            return whole(state[name], cast) if hasattr(state[name], "full_tensor") else state[name].detach()

        for part in self._parts:
            if part.renamed is not None:
                for name, called in zip(part.names, part.renamed, strict=True):
                    yield called, taken(name)
            else:
                converted = checkpoint_weights(self.policy, {name: taken(name) for name in part.names})
                for called in list(converted):
                    yield called, converted.pop(called)


def _shapes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without memory in place of a state's, the same one where the state has the same one."""
    made = {id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in state.values()}
    return {name: made[id(tensor)] for name, tensor in state.items()}


def _cut(policy: Any, shapes: dict[str, Tensor]) -> list[list[str]]:
    """The names of a state in parts that can be converted one by one: single weights, else layers, else all at once."""
    expected = sorted(_forms(policy, shapes))
    for part_of in (str, _layer):
        parts: dict[str, list[str]] = {}
        for name in shapes:
            parts.setdefault(part_of(name), []).append(name)
        forms = [form for part in parts.values() for form in _forms(policy, {name: shapes[name] for name in part})]
        if sorted(forms) == expected:
            return list(parts.values())
    return [list(shapes)]


def _layer(name: str) -> str:
    found = _LAYER.match(name)
    return found.group() if found else name


def _forms(policy: Any, shapes: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in checkpoint_weights(policy, shapes).items()]
