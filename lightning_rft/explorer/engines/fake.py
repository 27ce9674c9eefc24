"""An engine that computes nothing: for tests and simulation, with a settable speed."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.engines.engine import Engine, TensorInfo
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.sampling import Sampling

if TYPE_CHECKING:
    import torch

__all__ = ["FakeEngine"]


class FakeEngine(Engine):
    """Samples uniform tokens; all content follows from a request's seed alone.

    Lengths are geometric: many short, a few long, as in real rollouts. One that reaches ``max_new_tokens`` is cut
    there and finishes with ``"length"``, a shorter one with ``"stop"``; ``stop_token_ids`` and ``min_new_tokens`` hold.
    With ``top_k`` it samples from the first ids instead of from all. Anything else that is asked of sampling makes no
    difference. Weights are received in full and kept only as digests, in :attr:`loaded`.

    Args:
        model: Only for the description; nothing is read from it.
        tokens_per_second: Tokens per second that each running request gets, as on a GPU with room for all.
            ``None``: as fast as possible.
        mean_tokens: Mean length of a completion before the cut, in tokens.
        vocab_size: Token ids are below it; without ``top_k``, every token has the log-prob ``-log(vocab_size)``.
        max_num_seqs: Maximum requests that run at once; others wait in order of arrival.
        max_model_len: Maximum tokens of prompt and answer together; left out, what the prompts need, or the
            model's context with a workflow of your own.

    Attributes:
        loaded: blake2b hex digest of each tensor's bytes at the last :meth:`load`, by name.

    Example::

        RFTDataModule(tasks=tasks, reward=reward, engine=FakeEngine(tokens_per_second=100.0), explorers=2)
    """

    counts = (*Engine.counts, "mean_tokens", "vocab_size")

    computes = False
    gpus = 0

    def __init__(
        self,
        model: str | None = None,
        tokens_per_second: float | None = None,
        mean_tokens: int = 8,
        vocab_size: int = 64,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
    ) -> None:
        super().__init__(model, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        self.tokens_per_second = tokens_per_second
        self.mean_tokens = mean_tokens
        self.vocab_size = vocab_size
        self.loaded: dict[str, str] = {}

    @override
    def check(self) -> None:
        super().check()
        if self.tokens_per_second is not None and self.tokens_per_second <= 0:
            raise ConfigurationError(
                f"FakeEngine(tokens_per_second={self.tokens_per_second}): must be positive, or None for no wait."
            )

    @override
    def add(self, request: Request) -> None:
        super().add(request)
        running = self._running[request.id]
        running.rng.seed(request.sampling.seed)  # from the start, whatever was kept
        length = max(_geometric(running.rng, self.mean_tokens), request.sampling.min_new_tokens or 0)
        running.limit = min(running.limit, length)
        for _ in running.token_ids:
            running.rng.randrange(self._choices(request.sampling))

    @override
    def step(self) -> list[Completion]:
        batch = self._batch()
        if not batch:
            return []
        began = time.monotonic()
        finished = []
        for running in batch:
            sampling = running.request.sampling
            choices = self._choices(sampling)
            token_id, logprob = running.rng.randrange(choices), -math.log(choices)
            running.extend([token_id], [logprob], self.version)
            if sampling.keeps_support:
                running.choose_from(dict.fromkeys(range(choices), logprob))
            sampled = len(running.token_ids)
            ends = token_id in (sampling.stop_token_ids or ()) and sampled > (sampling.min_new_tokens or 0)
            if ends or running.cut or sampled >= running.limit:
                cut = not ends and (running.cut or running.limit == sampling.max_new_tokens)
                finished.append(self._finish(running, "length" if cut else "stop"))
        if self.tokens_per_second is not None:
            # The one sleep that is no waiting for something: the time that computing would take is what is simulated.
            time.sleep(max(0.0, began + 1.0 / self.tokens_per_second - time.monotonic()))
        return finished

    @override
    def load(self, manifest: Sequence[TensorInfo], version: int) -> None:
        loaded = {name: _digest(tensor) for name, tensor in self._receive(manifest)}
        self._check_whole(version, [info.name for info in manifest], loaded)
        self.loaded = loaded
        self.version = version

    @override
    def prompt_logprobs(self, prompt_ids: Sequence[int]) -> list[float]:
        self._need("score")
        return [-math.log(self.vocab_size)] * (len(prompt_ids) - 1)

    def _choices(self, sampling: Sampling) -> int:
        """How many tokens there are to choose from."""
        return min(sampling.truncation.top_k or self.vocab_size, self.vocab_size)


def _geometric(rng: random.Random, mean: int) -> int:
    """Draws a length of at least 1 with the given mean."""
    if mean == 1:
        return 1
    return 1 + int(math.log(1.0 - rng.random()) / math.log(1.0 - 1.0 / mean))


def _digest(tensor: torch.Tensor) -> str:
    import torch

    # By way of uint8, since numpy has no bfloat16; flat first, since a scalar cannot be viewed as more elements.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data).hexdigest()
