"""The engine protocol: tokens in, tokens with log-probs and versions out; load weights; stop.

An engine is made twice. The object that a user writes is a description: its ``__init__`` starts nothing and it
pickles. In the explorer process :meth:`Engine.start` brings it to life, and from then on one thread alone calls it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from lightning_rft.errors import ConfigurationError, TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.explorer.engines.links import WeightLink, WeightReceiver
from lightning_rft.explorer.engines.requests import Completion, Request, Running
from lightning_rft.explorer.engines.sleeping import DROPS, PARTS, WEIGHTS, Sleeping
from lightning_rft.explorer.engines.stops import reach, stop_at
from lightning_rft.model_folder import Pretrained
from lightning_rft.sampling import Sampling

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "TensorInfo", "listing"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


class Engine(ABC):
    """Base class of the inference engines: vLLM, transformers, fake.

    The order of calls is :meth:`prepare`, :meth:`start`, then any of :meth:`add`, :meth:`abort`, :meth:`cut`,
    :meth:`step`, :meth:`sampled`, :meth:`connect`, :meth:`load` and :meth:`prompt_logprobs`, all on one thread, then
    :meth:`stop`.

    Args:
        model: Model path or hub name, when it is not to be the module's.
        dtype: Dtype of the weights, such as ``"bfloat16"``; ``"auto"`` is decided by :meth:`start`.
        max_num_seqs: Maximum requests that run at once; more are given, which wait in order of arrival.
        max_model_len: Maximum tokens of prompt and answer together that the engine is made for; ``None``: what the
            prompts need, or the model's context with a workflow of the user's own. :meth:`start` may lower it to
            what its memory holds.

    Attributes:
        version: Version of the weights, ``-1`` before the first :meth:`load`, and after a sleep that dropped them.
    """

    #: Whether :meth:`connect` takes an NCCL link; decided by :meth:`start`.
    nccl: bool = False
    #: Whether its weights are on GPUs, where :meth:`connect` takes an IPC link, too; decided by :meth:`start`.
    ipc: bool = False
    #: Whether what it samples follows from the weights; a simulation's does not.
    computes: bool = True
    #: Weight-holding processes inside this engine.
    world_size: int = 1
    #: Processes on each of its GPUs, itself included; set before it is started.
    tenants: int = 1
    #: Whether it sleeps while the trainer has its GPUs; set before it is started.
    sleeps: bool = False
    #: Settings that are whole numbers of at least 1, where they are set.
    counts: tuple[str, ...] = ("max_num_seqs", "max_model_len")

    def __init__(
        self,
        model: str | None = None,
        dtype: str = "float32",
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.version = -1
        self._eos: frozenset[int] = frozenset()  # ids that end an answer
        self._running: dict[str, Running] = {}  # by id, in order of arrival
        self._receiver: WeightReceiver | None = None
        self._sleeping = Sleeping()

    @property
    def gpus(self) -> int:
        """Number of GPUs it takes where there are any."""
        return self.world_size

    @property
    def memory_share(self) -> float | None:
        """Share of each GPU's memory that it takes at its start; ``None`` if it takes as much as it needs."""
        return None

    def check(self) -> None:
        """Raises :class:`~lightning_rft.errors.ConfigurationError` for what can be known before a process starts."""
        name = type(self).__name__
        if self.dtype not in _DTYPES:
            raise ConfigurationError(f"{name}(dtype={self.dtype!r}): choose one of {', '.join(_DTYPES)}.")
        for setting in self.counts:
            value = getattr(self, setting)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name}({setting}={value!r}): must be a whole number of at least 1.")

    def check_sharing(self) -> None:
        """Raises :class:`~lightning_rft.errors.ConfigurationError` if it could not sleep where it has to."""

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises :class:`~lightning_rft.errors.ConfigurationError` for a setting that this engine does not know."""

    def environment(self, threads: int) -> dict[str, str]:
        """Environment variables that the explorer process must be started with, to use so many CPU threads."""
        # Threads that spin while they wait are fast on an idle machine and several times slower on a shared one: the
        # trainer, the explorers and whatever else runs take turns on the same cores.
        return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}

    def prepare(self) -> None:
        """Imports what :meth:`start` needs; called in the explorer process as soon as it is there."""

    def start(self, model: str | Pretrained, *, max_model_len: int, seed: int) -> None:
        """Loads the model and gets ready; an engine calls this one first.

        Args:
            model: Model path or hub name, or what explorers are given: its ``name``, ``revision`` and
                ``trust_remote_code``.
            max_model_len: Maximum tokens of prompt and completion together.
            seed: Seed of the run.
        """
        self.check()
        self._pretrained = Pretrained.of(model).other(self.model)
        self._longest = max_model_len
        self.version = -1

    def add(self, request: Request) -> None:
        """Queues a request; :meth:`step` runs it.

        Raises:
            ConfigurationError: It cannot run: longer than ``max_model_len``, an empty prompt, or a way of sampling that
                this engine does not know.
        """
        self._need("add a request")
        self.check_sampling(request.sampling)
        limit = request.sampling.max_new_tokens
        if not request.prompt_ids or limit is None or request.sampling.temperature is None:
            raise ConfigurationError(
                f"Request {request.id!r}: needs a prompt (has {len(request.prompt_ids)} tokens), max_new_tokens and "
                f"temperature (has {request.sampling})."
            )
        total = len(request.prompt_ids) + limit
        if total > self._longest:
            raise ConfigurationError(
                f"Request {request.id!r}: a prompt of {len(request.prompt_ids)} tokens and max_new_tokens="
                f"{limit} make {total}, more than max_model_len={self._longest}. Lower max_new_tokens, shorten the "
                "prompt or raise max_model_len."
            )
        running = self._running[request.id] = Running(request, limit)
        if request.kept is not None:
            running.resume(request.kept)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forgets requests; unknown ids are ignored."""
        for request_id in request_ids:
            self._running.pop(request_id, None)

    def cut(self, request_ids: Sequence[str]) -> None:
        """Has requests end with their next token, as if ``max_new_tokens`` were reached; unknown ids are ignored."""
        for request_id in request_ids:
            if request_id in self._running:
                self._running[request_id].cut = True

    def sampled(self, known: Mapping[str, int]) -> list[Completion]:
        """What running requests have sampled beyond the ``known`` number of tokens of each."""
        running = [(self._running[name], start) for name, start in known.items() if name in self._running]
        return [one.completion("", start) for one, start in running if len(one.token_ids) > start]

    @abstractmethod
    def step(self) -> list[Completion]:
        """Samples about one token for each running request and returns those that finished with it."""

    @property
    def has_work(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self._running)

    def connect(self, link: WeightLink) -> None:
        """Joins a weight transport; leaves an earlier one first."""
        self._disconnect()
        self._receiver = link.open(0)

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

    def sleep(self, level: int) -> None:
        """Gives the memory of its GPUs back, where it can, until it is told to :meth:`wake`.

        Level 1 keeps the weights in the CPU's memory, level 2 drops them: it samples again after the next :meth:`load`.

        Raises:
            ScheduleError: It has work, or sleeps, when :meth:`add`, :meth:`step` and :meth:`load` raise it.
        """
        self._sleeping.begin(level, busy=self.has_work)
        self.version = -1 if level == DROPS else self.version

    def wake(self, parts: Collection[str] = PARTS) -> list[str]:
        """Takes the memory of ``"weights"`` and ``"kv_cache"`` again, or of one of them; returns what of it slept."""
        return self._sleeping.end(parts)

    def stop(self) -> None:
        """Ends everything that :meth:`start` began; safe to call twice, and before :meth:`start`."""
        self._disconnect()
        self._running.clear()

    def _need(self, what: str, parts: Collection[str] = PARTS) -> None:
        """Raises ScheduleError if parts that it takes to do this sleep."""
        self._sleeping.check(what, parts, version=self.version)

    def _disconnect(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()

    def _batch(self) -> list[Running]:
        """The requests that sample in the next step."""
        self._need("step")
        return list(islice(self._running.values(), self.max_num_seqs))

    def _finish(self, running: Running, finish_reason: str) -> Completion:
        del self._running[running.request.id]
        return running.completion(finish_reason)

    def _reason(self, running: Running) -> str | None:
        """Why a request ends with its last token, if it does."""
        last, sampling = running.token_ids[-1], running.request.sampling
        if last in self._eos or last in (sampling.stop_token_ids or ()) or self._says_stop(running):
            return "stop"
        return "length" if running.cut or len(running.token_ids) == running.limit else None

    def _says_stop(self, running: Running) -> bool:
        """Whether the last token completed a text that ends the answer."""
        sampling, ids = running.request.sampling, running.token_ids
        if not sampling.stop or len(ids) <= (sampling.min_new_tokens or 0):
            return False
        return stop_at(self._tokenizer, ids[-reach(sampling.stop) :], sampling.stop) is not None

    @cached_property
    def _tokenizer(self) -> Any:
        return self._pretrained.tokenizer()

    def _receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        self._need("load", WEIGHTS)
        if self._receiver is None:
            raise TransportError("No weights can be loaded before connect(link).")
        return self._receiver.receive(manifest)

    @staticmethod
    def _check_whole(version: int, expected: Collection[str], arrived: Collection[str]) -> None:
        if missing := set(expected) - set(arrived):
            raise TransportError(
                f"Version {version} was not delivered whole: {listing(missing)} did not arrive, of {listing(expected)}."
            )


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Sorted names for an error message, cut where nobody would read on."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(map(repr, ordered[:limit])) + more
