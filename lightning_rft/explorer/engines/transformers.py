"""The engine on plain transformers: no vLLM needed (laptops, GPU checks), and the oracle for log-probs.

It steps like a continuous batch. All running requests share one left-padded batch and one KV cache; whenever that
cache may not be what the weights and the batch say, it is thrown away and rebuilt by a prefill of prompts and tokens
so far. That costs a prefill per join, and there is only one way for a cache to be right.
"""

from __future__ import annotations

import inspect
import math
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_rft.errors import ConfigurationError, RFTError, TransportError
from lightning_rft.explorer.engines.engine import Completion, Engine, Request, TensorInfo, WeightLink, WeightReceiver
from lightning_rft.hardware import fast_dtype
from lightning_rft.model_folder import checkpoint_weights, end_ids, right_attention

if TYPE_CHECKING:
    import torch

__all__ = ["TransformersEngine"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class _Running:
    """A request with what it has sampled so far; the three lists are equally long."""

    request: Request
    rng: random.Random
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def complete(self, finish_reason: str) -> Completion:
        return Completion(
            self.request.id, tuple(self.token_ids), tuple(self.logprobs), tuple(self.versions), finish_reason
        )


class TransformersEngine(Engine):
    """Samples with ``AutoModelForCausalLM`` in this process, on one device.

    Log-probs are taken from fp32 logits; with ``dtype="float32"`` they agree with a plain forward of the same model
    to about 1e-5.

    Args:
        model: Model path or hub name, when it is not to be the module's.
        dtype: Of the weights: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on a CPU, on a
            GPU bfloat16, or float16 where it has no units for that.
        device: A torch device, or ``"auto"``: a GPU if there is one.
        max_batch_size: Most requests to run at once; more wait in order of arrival.
        max_model_len: Maximum tokens of prompt and answer together; left out, what the prompts need, or the
            model's context with a workflow of your own.

    Example::

        RFTDataModule(tasks=tasks, reward=reward, engine=TransformersEngine(dtype="float32"))
    """

    def __init__(
        self,
        model: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_batch_size: int = 64,
        max_model_len: int | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.device = device
        self.max_batch_size = self.max_num_seqs = max_batch_size
        self.max_model_len = max_model_len
        self.version = -1
        self._queued: deque[_Running] = deque()
        self._running: list[_Running] = []  # row i of the batch is _running[i]
        self._lm: Any = None
        self._receiver: WeightReceiver | None = None
        self._cache: Any = None  # KV of every token but the last of each row; None: to be rebuilt
        self._mask: torch.Tensor | None = None  # [rows, length] of what the cache holds; 0 is left padding
        self._torn = False

    def check(self) -> None:
        """Raises ConfigurationError for an unknown dtype or a batch of none."""
        if self.dtype not in _DTYPES:
            raise ConfigurationError(f"TransformersEngine(dtype={self.dtype!r}): choose one of {', '.join(_DTYPES)}.")
        if self.max_batch_size < 1:
            raise ConfigurationError(
                f"TransformersEngine(max_batch_size={self.max_batch_size}): must be at least 1, or nothing ever runs."
            )

    def prepare(self) -> None:
        """Imports torch and transformers."""
        from transformers import AutoModelForCausalLM  # noqa: F401

    def start(self, model: str, *, max_model_len: int, seed: int) -> None:
        """Loads the model; ``self.model``, where set, goes before ``model``. ``seed`` is unused: requests bring one."""
        self.check()
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        if self.dtype == "auto":
            self.dtype = "float32" if self._device.type == "cpu" else fast_dtype(self._device.type)
        config = AutoConfig.from_pretrained(self.model or model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.model or model, dtype=getattr(torch, self.dtype), attn_implementation=right_attention(config)
        )
        self._lm = loaded.to(self._device).eval()
        self._eos = end_ids(self.model or model)
        # Spares a prefill the logits of whole prompts, [rows, length, vocab], where the model can.
        takes = inspect.signature(self._lm.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._max_model_len = max_model_len
        self.version = -1

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ConfigurationError: It cannot run: longer than ``max_model_len``, an empty prompt, nothing to sample, or a
                temperature below 0.
        """
        total = len(request.prompt_ids) + request.max_new_tokens
        if total > self._max_model_len:
            raise ConfigurationError(
                f"Request {request.id!r}: a prompt of {len(request.prompt_ids)} tokens and max_new_tokens="
                f"{request.max_new_tokens} make {total}, more than max_model_len={self._max_model_len}. Lower "
                "max_new_tokens, shorten the prompt or raise max_model_len."
            )
        if not request.prompt_ids or request.max_new_tokens < 1 or request.temperature < 0:
            raise ConfigurationError(
                f"Request {request.id!r}: needs a prompt (has {len(request.prompt_ids)} tokens), max_new_tokens >= 1 "
                f"(is {request.max_new_tokens}) and temperature >= 0 (is {request.temperature})."
            )
        # Not a torch.Generator: on a CPU that one reads only the low 32 bits of its seed.
        self._queued.append(_Running(request, random.Random(request.seed)))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forgets requests; unknown ids are ignored."""
        gone = set(request_ids)
        self._queued = deque(item for item in self._queued if item.request.id not in gone)
        self._keep([row for row, item in enumerate(self._running) if item.request.id not in gone])

    def step(self) -> list[Completion]:
        """Samples one token for every running request and returns those that finished with it.

        Raises:
            TransportError: The last :meth:`load` failed half-way, so the weights are of no version.
            RFTError: The weights give log-probs that are not finite.
        """
        while self._queued and len(self._running) < self.max_batch_size:
            self._running.append(self._queued.popleft())
            self._cache = None
        if not self._running:
            return []
        finished: list[Completion] = []
        unfinished: list[int] = []
        for row, (token_id, logprob) in enumerate(self._sample(self._next_logits())):
            item = self._running[row]
            if not math.isfinite(logprob):
                raise RFTError(f"Weights of version {self.version} give a log-prob of {logprob}: training diverged?")
            item.token_ids.append(token_id)
            item.logprobs.append(logprob)
            item.versions.append(self.version)
            if token_id in self._eos:
                finished.append(item.complete("stop"))
            elif len(item.token_ids) == item.request.max_new_tokens:
                finished.append(item.complete("length"))
            else:
                unfinished.append(row)
        self._keep(unfinished)
        return finished

    @property
    def has_work(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self._queued or self._running)

    def connect(self, link: WeightLink) -> None:
        """Joins a weight transport as its only member; leaves an earlier one first."""
        self._disconnect()
        self._receiver = link.open(0)

    def load(self, manifest: Sequence[TensorInfo], version: int) -> None:
        """Copies every tensor into the ``state_dict`` entry of its name, cast to the engine's dtype.

        Raises:
            TransportError: Not connected; or a name that the model does not have, a wrong shape, or a name that was
                not delivered. The weights are then of no version, and the engine computes nothing until a load
                succeeds.
        """
        import torch

        if self._receiver is None:
            raise TransportError("No weights can be loaded before connect(link).")
        # Aliases of tied weights are entries of their own: they are delivered, and written, once more.
        state: dict[str, torch.Tensor] = self._lm.state_dict()
        named = checkpoint_weights(self._lm, state)
        delivered: dict[str, torch.Tensor] = {}
        self._torn = True
        self._cache = None  # its keys and values are those of the old weights
        with torch.no_grad():
            for name, tensor in self._receiver.receive(manifest):
                if name not in named:
                    raise TransportError(f"The model has no weight {name!r}; it expects {_listing(named)}.")
                if tensor.shape != named[name].shape:
                    raise TransportError(
                        f"Weight {name!r} arrived with shape {tuple(tensor.shape)}, but the model's has "
                        f"{tuple(named[name].shape)}. Were trainer and engine started from the same model?"
                    )
                if named is state:
                    state[name].copy_(tensor)
                delivered[name] = named[name] if named is state else tensor
        expected = named.keys() | {info.name for info in manifest}
        if missing := expected - delivered.keys():
            raise TransportError(
                f"Version {version} was not delivered whole: {_listing(missing)} did not arrive; "
                f"the model expects {_listing(named)}."
            )
        if named is not state:  # the way in from a checkpoint is transformers' own
            model, config = type(self._lm), self._lm.config
            loaded = model.from_pretrained(None, config=config, state_dict=delivered, dtype=self._lm.dtype)
            self._lm.load_state_dict(loaded.state_dict())
        self._torn = False
        self.version = version

    def prompt_logprobs(self, prompt_ids: Sequence[int]) -> list[float]:
        """Log-prob (temperature 1) of each prompt token but the first: ``len(prompt_ids) - 1`` values."""
        import torch

        ids = torch.tensor([list(prompt_ids)], device=self._device)
        with torch.inference_mode():
            logits = self._forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            logprobs = logits[0, :-1].float().log_softmax(-1)
            return list(map(float, logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()))

    def stop(self) -> None:
        """Leaves the transport and lets go of model and requests; safe to call twice, and before :meth:`start`."""
        self._disconnect()
        self._queued.clear()
        self._running.clear()
        self._lm = self._cache = self._mask = None

    def _disconnect(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()

    def _forward(self, **inputs: Any) -> Any:
        if self._lm is None:
            raise RFTError("The engine is not running: call start() first.")
        if self._torn:
            raise TransportError("The last load failed half-way: old and new weights are mixed. Load a whole version.")
        return self._lm(**inputs)

    def _next_logits(self) -> torch.Tensor:
        """Runs the model on what the cache does not hold yet; returns fp32 logits of the next tokens, [rows, vocab]."""
        import torch

        cache, self._cache = self._cache, None  # a forward that fails half-way leaves nothing to go on from
        with torch.inference_mode():
            if cache is None or self._mask is None:
                rows = [[*item.request.prompt_ids, *item.token_ids] for item in self._running]
                length = max(map(len, rows))
                ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=self._device)
                lengths = torch.tensor([len(row) for row in rows], device=self._device)
                columns = torch.arange(length, device=self._device)
                self._mask = (columns >= length - lengths[:, None]).long()
            else:
                ids = torch.tensor([[item.token_ids[-1]] for item in self._running], device=self._device)
                self._mask = torch.cat((self._mask, self._mask.new_ones(len(ids), 1)), dim=1)
            # A position counts the real tokens before it, so that padding, and with it the neighbours, is moot.
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = self._forward(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **self._last_only,
            )
            # A model without such a cache returns None here: every step is then a prefill, slow and right.
            self._cache = getattr(output, "past_key_values", None)
            logits: torch.Tensor = output.logits[:, -1].float()
            return logits

    def _sample(self, logits: torch.Tensor) -> list[tuple[int, float]]:
        """Draws one (token id, log-prob) per row of ``logits`` [rows, vocab], each from its request's own numbers."""
        import torch

        with torch.inference_mode():
            temperatures = [item.request.temperature for item in self._running]
            greedy = torch.tensor([value == 0 for value in temperatures], device=self._device)
            scale = torch.tensor([value or 1.0 for value in temperatures], device=self._device)
            logprobs = (logits / scale[:, None]).log_softmax(-1)
            # Inverse of the cumulative distribution: one number per token whatever the batch and the device. In
            # float64, since in float32 the sum over a large vocabulary would round rare tokens away.
            cumulative = logprobs.double().exp().cumsum(-1)
            uniform = torch.tensor(
                [[item.rng.random()] for item in self._running], dtype=torch.float64, device=self._device
            )
            drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
            drawn = drawn.clamp(max=logits.shape[-1] - 1)
            chosen = torch.where(greedy[:, None], logprobs.argmax(-1, keepdim=True), drawn)
            chosen_logprobs = logprobs.gather(-1, chosen)
            return list(zip(chosen[:, 0].tolist(), chosen_logprobs[:, 0].tolist(), strict=True))

    def _keep(self, rows: list[int]) -> None:
        """Drops all other rows from the batch."""
        if len(rows) == len(self._running):
            return
        self._running = [self._running[row] for row in rows]
        if not rows or self._mask is None or not _rows_selectable(self._cache):
            self._cache = None
            return
        import torch

        with torch.inference_mode():
            index = torch.tensor(rows, device=self._device)
            self._cache.batch_select_indices(index)
            self._mask = self._mask[index]


def _rows_selectable(cache: Any) -> bool:
    """Whether ``batch_select_indices`` is known to reach all of a cache's state, which it does not for SSM layers."""
    from transformers import cache_utils

    known = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in known for layer in layers)


def _listing(names: Iterable[str], limit: int = 20) -> str:
    """Sorted names for an error message, cut where nobody would read on."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
