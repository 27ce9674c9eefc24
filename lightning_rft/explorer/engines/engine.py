"""The engine protocol: tokens in, tokens with log-probs and versions out; load weights; stop.

An engine is made twice. The object that a user writes is a description: its ``__init__`` starts nothing and it
pickles. In the explorer process :meth:`Engine.start` brings it to life, and from then on one thread alone calls it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lightning_rft.experience import Support, TensorInfo, Truncation

if TYPE_CHECKING:
    import torch

__all__ = ["Completion", "Engine", "Request", "TensorInfo", "WeightLink", "WeightReceiver"]


@dataclass(frozen=True)
class Request:
    """One completion to sample.

    Args:
        id: Unique among the running requests.
        prompt_ids: Token ids of the prompt; not empty.
        max_new_tokens: Most tokens to sample, at least 1.
        temperature: Softmax temperature; ``0`` is greedy.
        seed: Seeds this request's own random numbers, so that its content does not depend on its neighbours'.
        sampling: Truncation of the distribution. No engine applies it yet, and nothing asks for any.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    sampling: Truncation = Truncation()  # noqa: RUF009 (immutable)


@dataclass(frozen=True)
class Completion:
    """The answer to a :class:`Request`; the three tuples are equally long.

    Args:
        request_id: :attr:`Request.id`.
        token_ids: Sampled token ids, the end-of-sequence token included when it was sampled.
        logprobs: Natural-log probability of each under the distribution it was drawn from (temperature applied).
        versions: Version of the weights that sampled each.
        finish_reason: ``"stop"`` or ``"length"``.
        support: What truncation left to choose from, for each of them.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finish_reason: str
    support: Support | None = None


class WeightReceiver(Protocol):
    """The receiving half of a transport, in the process that holds the engine's weights."""

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every tensor of the manifest, in order; what anything refers to keeps its contents."""
        ...

    def close(self) -> None:
        """Leaves the transport; safe to call twice."""
        ...


class WeightLink(Protocol):
    """A picklable invitation from a transport; opening it makes the receiver."""

    def open(self, member: int) -> WeightReceiver:
        """Joins as the ``member``-th weight-holding process of this engine (0 unless tensor-parallel)."""
        ...


class Engine(ABC):
    """Base class of the inference engines: vLLM, transformers, fake.

    The order of calls is :meth:`prepare`, :meth:`start`, then any of :meth:`add`, :meth:`abort`, :meth:`step`,
    :meth:`connect`, :meth:`load` and :meth:`prompt_logprobs`, all on one thread, then :meth:`stop`.
    """

    #: Model path or hub name, when it is not to be the module's.
    model: str | None = None
    #: Dtype of the weights, such as ``"bfloat16"``; ``"auto"`` is decided by :meth:`start`.
    dtype: str = "float32"
    #: Whether :meth:`connect` takes an NCCL link; decided by :meth:`start`.
    nccl: bool = False
    #: Most requests that run at once; it is given some more, which wait inside the engine in order of arrival.
    max_num_seqs: int = 64
    #: Maximum tokens of prompt and answer together that the engine is made for; ``None``: what the prompts need, or the
    #: model's context with a workflow of the user's own. :meth:`start` may lower it to what its memory holds.
    max_model_len: int | None = None
    #: Weight-holding processes inside this engine (tensor times pipeline parallel size).
    world_size: int = 1

    def check(self) -> None:
        """Raises :class:`~lightning_rft.errors.ConfigurationError` for what can be known before a process starts."""

    def environment(self, threads: int) -> dict[str, str]:
        """Environment variables that the explorer process must be started with.

        Args:
            threads: CPU threads that this explorer may use.
        """
        # Threads that spin while they wait are fast on an idle machine and several times slower on a shared one: the
        # trainer, the explorers and whatever else runs take turns on the same cores.
        return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}

    def prepare(self) -> None:
        """Imports what :meth:`start` needs; called in the explorer process as soon as it is there."""

    @abstractmethod
    def start(self, model: str, *, max_model_len: int, seed: int) -> None:
        """Loads the model and gets ready; version of the weights is ``-1`` until the first :meth:`load`.

        Args:
            model: Model path or hub name.
            max_model_len: Most tokens of prompt and completion together.
            seed: Seed of the run.
        """

    @abstractmethod
    def add(self, request: Request) -> None:
        """Queues a request; :meth:`step` runs it."""

    @abstractmethod
    def abort(self, request_ids: Sequence[str]) -> None:
        """Forgets requests; unknown ids are ignored."""

    @abstractmethod
    def step(self) -> list[Completion]:
        """Samples about one token for each running request and returns those that finished with it."""

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """Whether any request is queued or running."""

    @abstractmethod
    def connect(self, link: WeightLink) -> None:
        """Joins a weight transport; replaces an earlier one."""

    @abstractmethod
    def load(self, manifest: Sequence[TensorInfo], version: int) -> None:
        """Receives the weights of ``version`` and computes with them from the next :meth:`step` on.

        Caches of the old weights are gone and running requests are recomputed when it returns; tokens sampled
        afterwards carry ``version``.

        Raises:
            TransportError: A tensor did not arrive, was not taken by the model, or a weight was left out.
        """

    @abstractmethod
    def prompt_logprobs(self, prompt_ids: Sequence[int]) -> list[float]:
        """Log-prob (temperature 1) of each prompt token but the first, given those before: what the weights say."""

    @abstractmethod
    def stop(self) -> None:
        """Ends everything that :meth:`start` began; safe to call twice."""
