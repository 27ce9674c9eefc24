"""An engine that computes nothing: for tests and simulation, with a settable speed."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_rft.errors import ConfigurationError, TransportError
from lightning_rft.explorer.engines.engine import Completion, Engine, Request, TensorInfo, WeightLink, WeightReceiver

if TYPE_CHECKING:
    import torch

__all__ = ["FakeEngine"]


@dataclass
class _Running:
    """A request, the length drawn for it, and what it has so far."""

    request: Request
    length: int
    rng: random.Random
    token_ids: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class FakeEngine(Engine):
    """Samples uniform tokens; all content follows from a request's seed alone.

    Lengths are geometric: many short, a few long, as in real rollouts. One that reaches ``max_new_tokens`` is cut
    there and finishes with ``"length"``, a shorter one with ``"stop"``. Weights are received in full and kept only as
    digests, in :attr:`loaded`.

    Args:
        model: Only for the description; nothing is read from it.
        tokens_per_second: Tokens per second that each running request gets, as on a GPU with room for all.
            ``None``: as fast as possible.
        mean_tokens: Mean length of a completion before the cut, in tokens.
        vocab_size: Token ids are below it; every token has the log-prob ``-log(vocab_size)``.
        max_num_seqs: Most requests that run at once; others wait in order of arrival.
        max_model_len: Maximum tokens of prompt and answer together; left out, what the prompts need, or the
            model's context with a workflow of your own.

    Attributes:
        loaded: blake2b hex digest of each tensor's bytes at the last :meth:`load`, by name.
        version: Version of the last load, ``-1`` before the first.

    Example::

        RFTDataModule(tasks=tasks, reward=reward, engine=FakeEngine(tokens_per_second=100.0), explorers=2)
    """

    def __init__(
        self,
        model: str | None = None,
        tokens_per_second: float | None = None,
        mean_tokens: int = 8,
        vocab_size: int = 64,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
    ) -> None:
        self.model = model
        self.tokens_per_second = tokens_per_second
        self.mean_tokens = mean_tokens
        self.vocab_size = vocab_size
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.loaded: dict[str, str] = {}
        self.version = -1
        self._running: list[_Running] = []
        self._receiver: WeightReceiver | None = None

    def check(self) -> None:
        """Raises ConfigurationError for a speed, length or vocabulary that cannot be."""
        if self.tokens_per_second is not None and self.tokens_per_second <= 0:
            raise ConfigurationError(
                f"FakeEngine(tokens_per_second={self.tokens_per_second}): must be positive, or None for no wait."
            )
        for name in ("mean_tokens", "vocab_size", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"FakeEngine({name}={getattr(self, name)}): must be at least 1.")

    def start(self, model: str, *, max_model_len: int, seed: int) -> None:
        """Gets ready; ``model`` and ``seed`` are unused."""
        self.check()
        self._max_model_len = max_model_len
        self.version = -1
        self.loaded = {}

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ConfigurationError: It is longer than ``max_model_len``, as a real engine would say.
        """
        total = len(request.prompt_ids) + request.max_new_tokens
        if total > self._max_model_len:
            raise ConfigurationError(
                f"Request {request.id!r}: a prompt of {len(request.prompt_ids)} tokens and max_new_tokens="
                f"{request.max_new_tokens} make {total}, more than max_model_len={self._max_model_len}. Lower "
                "max_new_tokens, shorten the prompt or raise max_model_len."
            )
        rng = random.Random(request.seed)
        self._running.append(_Running(request, _geometric(rng, self.mean_tokens), rng))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forgets requests; unknown ids are ignored."""
        gone = set(request_ids)
        self._running = [item for item in self._running if item.request.id not in gone]

    def step(self) -> list[Completion]:
        """Gives every running request one token and returns those that are complete."""
        if not self._running:
            return []
        began = time.monotonic()
        finished, unfinished = [], []
        for item in self._running[: self.max_num_seqs]:
            item.token_ids.append(item.rng.randrange(self.vocab_size))
            item.versions.append(self.version)
            if len(item.token_ids) < min(item.length, item.request.max_new_tokens):
                unfinished.append(item)
            else:
                finished.append(self._complete(item))
        self._running = unfinished + self._running[self.max_num_seqs :]
        if self.tokens_per_second is not None:
            # The one sleep that is no waiting for something: the time that computing would take is what is simulated.
            time.sleep(max(0.0, began + 1.0 / self.tokens_per_second - time.monotonic()))
        return finished

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._running)

    def connect(self, link: WeightLink) -> None:
        """Joins a weight transport; leaves an earlier one first."""
        self._disconnect()
        self._receiver = link.open(0)

    def load(self, manifest: Sequence[TensorInfo], version: int) -> None:
        """Receives all tensors and keeps their digests.

        Raises:
            TransportError: Not connected, or not as many names arrived as the manifest has.
        """
        if self._receiver is None:
            raise TransportError("No weights can be loaded before connect(link).")
        loaded = {name: _digest(tensor) for name, tensor in self._receiver.receive(manifest)}
        if len(loaded) != len(manifest):
            missing = sorted({info.name for info in manifest} - loaded.keys())
            raise TransportError(
                f"Version {version} was not delivered whole: {len(loaded)} of {len(manifest)} names arrived; "
                f"missing: {missing}."
            )
        self.loaded = loaded
        self.version = version

    def prompt_logprobs(self, prompt_ids: Sequence[int]) -> list[float]:
        """The uniform log-prob, ``len(prompt_ids) - 1`` times."""
        return [-math.log(self.vocab_size)] * (len(prompt_ids) - 1)

    def stop(self) -> None:
        """Leaves the transport and forgets all requests; safe to call twice."""
        self._disconnect()
        self._running = []

    def _disconnect(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()

    def _complete(self, item: _Running) -> Completion:
        return Completion(
            request_id=item.request.id,
            token_ids=tuple(item.token_ids),
            logprobs=(-math.log(self.vocab_size),) * len(item.token_ids),
            versions=tuple(item.versions),
            finish_reason="stop" if item.length < item.request.max_new_tokens else "length",
        )


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
