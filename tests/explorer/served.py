"""Policies with an endpoint over one engine, as an explorer has them, and an engine that says what it is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.worker.endpoint import Endpoints
from lightning_rft.explorer.worker.stepper import Stepper
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.sampling import Sampling


class Scripted(FakeEngine):
    """Says what a function makes of the prompt's text, once its gate is open.

    It begins with a token that has no text: what is decoded and encoded again is not what was sampled.
    """

    def __init__(self, says: Callable[[str], str] = lambda prompt: "ok", **settings: Any) -> None:
        super().__init__(**settings)
        self.says = says
        self.asked: list[Request] = []
        self.gate = threading.Event()
        self.gate.set()

    def add(self, request: Request) -> None:
        super().add(request)
        self.asked.append(request)
        self._eos = frozenset({self._tokenizer.eos_token_id})

    def step(self) -> list[Completion]:
        if not self.gate.wait(0.01):
            return []
        finished = []
        for running in self._batch():
            running.limit = running.request.sampling.max_new_tokens or 0
            text = self.says(self._tokenizer.decode(running.request.prompt_ids))
            ids = self._tokenizer(text)["input_ids"]
            for token in (self._tokenizer.unk_token_id, *ids, self._tokenizer.eos_token_id):
                running.extend([token], [-0.5], self.version)
                if running.request.sampling.keeps_support:
                    running.choose_from({token: -0.5, token + 1: -1.0})
                reason = self._reason(running)
                if reason is not None:
                    break
            assert reason is not None
            finished.append(self._finish(running, reason))
        return finished


@dataclass
class Served:
    """What tests do with an endpoint."""

    stepper: Stepper
    tokenizer: Any
    endpoints: Endpoints = field(default_factory=Endpoints)
    policies: list[Policy] = field(default_factory=list)
    _numbers: Any = field(default_factory=count)

    def policy(self, **changes: Any) -> Policy:
        """The policy of one more sample."""
        number = next(self._numbers)
        settings: dict[str, Any] = {
            "name": f"run/{number}",
            "sampling": Sampling(max_new_tokens=64, temperature=0.7),
            "max_model_len": 4096,
            "seed": number,
            "serve": self.endpoints.open,
        }
        self.policies.append(Policy(self.stepper.sample, self.tokenizer, **settings | changes))
        return self.policies[-1]


@asynccontextmanager
async def served(model: Path, engine: Engine, tokenizer: Any = None) -> AsyncIterator[Served]:
    """Starts an engine and has it served; nothing of it is left afterwards."""
    loop = asyncio.get_running_loop()
    stepper = Stepper(engine, loop)
    all_of_it = Served(stepper, tokenizer or AutoTokenizer.from_pretrained(model))
    try:
        await stepper.call(engine.start, str(model), max_model_len=10**6, seed=0)
        yield all_of_it
    finally:
        for policy in all_of_it.policies:
            policy.close()
        all_of_it.endpoints.stop()
        await asyncio.to_thread(stepper.stop, 10)
    assert stepper.error is None
