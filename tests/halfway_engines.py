"""Engines that wait in the middle of batch 1 for the weights that batch 0 makes: a swap in mid-generation for sure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning_rft as rft
from lightning_rft.explorer.engines.requests import Completion, Request

_TOKENS = 5  # sampled with the old weights
_POLL_S = 0.005


class _Halfway(rft.Engine):
    """Waits only while the file ``switch`` exists; whoever asks for drained engines removes it."""

    switch: Path
    version: int

    def start(self, model: str, *, max_model_len: int, seed: int) -> None:
        super().start(model, max_model_len=max_model_len, seed=seed)
        self._first: set[str] = set()  # requests of batch 0 that run
        self._later: list[Request] = []
        self._steps = 0

    def add(self, request: Request) -> None:
        if request.id.split("/")[1] == "0":
            self._first.add(request.id)
            super().add(request)
        else:
            self._later.append(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        self._first -= set(request_ids)
        self._later = [request for request in self._later if request.id not in request_ids]
        super().abort(request_ids)

    def step(self) -> list[Completion]:
        if not self._first or not self.switch.exists():
            for request in self._later:
                super().add(request)
            if self._later:
                self._steps = 0
            self._later = []
            if self.version == 0 and self._steps >= _TOKENS and self.switch.exists():
                time.sleep(_POLL_S)
                return []
        self._steps += 1
        finished = super().step()
        self._first -= {completion.request_id for completion in finished}
        return finished

    @property
    def has_work(self) -> bool:
        return bool(self._later) or super().has_work


class HalfwayTransformersEngine(_Halfway, rft.TransformersEngine):
    pass


class HalfwayVLLMEngine(_Halfway, rft.VLLMEngine):
    """Its grammars of JSON have no white space, of which a model that knows nothing would write too much."""

    def start(self, model: Any, *, max_model_len: int, seed: int) -> None:
        from vllm.config import StructuredOutputsConfig

        json = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
        self.engine_args["structured_outputs_config"] = json
        super().start(model, max_model_len=max_model_len, seed=seed)
