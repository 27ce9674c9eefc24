"""The engine on plain transformers: no vLLM needed (laptops, GPU checks), and the oracle for log-probs.

It steps like a continuous batch. All running requests share one left-padded batch and one KV cache; whenever that
cache may not be what the weights and the batch say, it is thrown away and rebuilt by a prefill of prompts and tokens
so far. That costs a prefill per join, and there is only one way for a cache to be right.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_rft.errors import ConfigurationError, RFTError, TransportError
from lightning_rft.explorer.engines.engine import Engine, TensorInfo, listing
from lightning_rft.explorer.engines.requests import Completion, Request, Running
from lightning_rft.explorer.engines.sleeping import KEEPS, PARTS, WEIGHTS
from lightning_rft.hardware import fast_dtype
from lightning_rft.model_folder import Pretrained, checkpoint_weights, right_attention
from lightning_rft.sampling import Sampling

if TYPE_CHECKING:
    import torch

__all__ = ["TransformersEngine"]


class TransformersEngine(Engine):
    """Samples with ``AutoModelForCausalLM`` in this process, on one device.

    It takes all settings of :class:`Sampling` but ``structured``. Log-probs are taken from fp32 logits; with
    ``dtype="float32"`` they agree with a plain forward of the same model to about 1e-5.

    Args:
        model: Model path or hub name, when it is not to be the module's.
        dtype: Of the weights: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on a CPU, on a
            GPU bfloat16, or float16 where it has no units for that.
        device: A torch device, or ``"auto"``: a GPU if there is one.
        max_batch_size: Maximum requests that run at once; more wait in order of arrival.
        max_model_len: Maximum tokens of prompt and answer together; left out, what the prompts need, or the
            model's context with a workflow of your own.

    Example::

        RFTDataModule(tasks=tasks, reward=reward, engine=TransformersEngine(dtype="float32"))
    """

    counts = ("max_batch_size", "max_model_len")
    _frees = ("cuda",)  # types of the devices whose memory it gives back asleep

    def __init__(
        self,
        model: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_batch_size: int = 64,
        max_model_len: int | None = None,
    ) -> None:
        super().__init__(model, dtype, max_batch_size, max_model_len)
        self.device = device
        self.max_batch_size = max_batch_size
        self._lm: Any = None
        self._rows: list[Running] = []  # of the batch that was last computed
        self._cache: Any = None  # KV of every token but the last of each row; None: to be rebuilt
        self._mask: torch.Tensor | None = None  # [rows, length] of what the cache holds; 0 is left padding
        self._torn = False
        self._away: list[tuple[torch.UntypedStorage, int, torch.UntypedStorage | None]] = []  # asleep, of each weight

    @property
    @override
    def gpus(self) -> int:
        return int(self.device in ("auto", "cuda"))  # one that is named by its index is its user's choice

    @override
    def check_sampling(self, sampling: Sampling) -> None:
        if sampling.structured:
            raise ConfigurationError(
                f"structured={sampling.structured} needs vLLM, which knows grammars: set engine=VLLMEngine(), or leave "
                "it out"
            )

    @override
    def prepare(self) -> None:
        from transformers import AutoModelForCausalLM  # noqa: F401

    @override
    def start(self, model: str | Pretrained, *, max_model_len: int, seed: int) -> None:
        super().start(model, max_model_len=max_model_len, seed=seed)
        import torch

        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self.ipc = self._device.type == "cuda"
        if self.dtype == "auto":
            self.dtype = "float32" if self._device.type == "cpu" else fast_dtype(self._device.type)
        attention = right_attention(self._pretrained.config())
        loaded = self._pretrained.load(dtype=getattr(torch, self.dtype), attn_implementation=attention)
        self._lm = loaded.to(self._device).eval()
        self._eos = self._pretrained.end_ids()
        # Spares a prefill the logits of whole prompts, [rows, length, vocab], where the model can.
        takes = inspect.signature(self._lm.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    @override
    def add(self, request: Request) -> None:
        super().add(request)
        named = {*(request.sampling.logit_bias or ()), *(request.sampling.stop_token_ids or ())}
        vocabulary = self._lm.config.get_text_config().vocab_size
        if named and max(named) >= vocabulary:
            self.abort([request.id])
            raise ConfigurationError(
                f"logit_bias and stop_token_ids name token id {max(named)}, but the model has {vocabulary} tokens"
            )

    @override
    def step(self) -> list[Completion]:
        rows = self._batch()
        if not rows:
            return []
        finished: list[Completion] = []
        for running, token_id, logprob in zip(rows, *self._sample(rows, self._next_logits(rows)), strict=True):
            if not math.isfinite(logprob):
                raise RFTError(f"Weights of version {self.version} give a log-prob of {logprob}: training diverged?")
            running.extend([token_id], [logprob], self.version)
            reason = self._reason(running)
            if reason is not None:
                finished.append(self._finish(running, reason))
        if not self._running:
            self._cache = None
        return finished

    @override
    def load(self, manifest: Sequence[TensorInfo], version: int) -> None:
        import torch

        arriving = self._receive(manifest)
        # Aliases of tied weights are entries of their own: they are delivered, and written, once more.
        state: dict[str, torch.Tensor] = self._lm.state_dict()
        named = checkpoint_weights(self._lm, state)
        delivered: dict[str, torch.Tensor] = {}
        self._torn = True
        self._cache = None  # its keys and values are those of the old weights
        with torch.no_grad():
            for name, tensor in arriving:
                if name not in named:
                    raise TransportError(f"The model has no weight {name!r}; it expects {listing(named)}.")
                if tensor.shape != named[name].shape:
                    raise TransportError(
                        f"Weight {name!r} arrived with shape {tuple(tensor.shape)}, but the model's has "
                        f"{tuple(named[name].shape)}. Were trainer and engine started from the same model?"
                    )
                if named is state:
                    state[name].copy_(tensor)
                delivered[name] = named[name] if named is state else tensor
        self._check_whole(version, named.keys() | {info.name for info in manifest}, delivered)
        if named is not state:  # the way in from a checkpoint is transformers' own
            model, config = type(self._lm), self._lm.config
            loaded = model.from_pretrained(None, config=config, state_dict=delivered, dtype=self._lm.dtype)
            self._lm.load_state_dict(loaded.state_dict())
        self._torn = False
        self.version = version

    @override
    def prompt_logprobs(self, prompt_ids: Sequence[int]) -> list[float]:
        import torch

        self._need("score")
        ids = torch.tensor([list(prompt_ids)], device=self._device)
        with torch.inference_mode():
            logits = self._forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            logprobs = logits[0, :-1].float().log_softmax(-1)
            return list(map(float, logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()))

    @override
    def sleep(self, level: int) -> None:
        import torch

        super().sleep(level)
        self._rows, self._cache, self._mask = [], None, None
        if self._device.type in self._frees:
            for parameter in self._lm.parameters():
                storage = parameter.untyped_storage()
                size = storage.nbytes()
                kept = torch.UntypedStorage(size).copy_(storage) if level == KEEPS else None
                self._away.append((storage, size, kept))
                storage.resize_(0)
            torch.cuda.empty_cache()

    @override
    def wake(self, parts: Collection[str] = PARTS) -> list[str]:
        woken = super().wake(parts)
        if not set(WEIGHTS).isdisjoint(woken):
            for storage, size, kept in self._away:
                storage.resize_(size)
                if kept is not None:
                    storage.copy_(kept)
            self._away = []
        return woken

    @override
    def stop(self) -> None:
        super().stop()
        self._rows, self._away = [], []
        self._lm = self._cache = self._mask = None

    def _forward(self, **inputs: Any) -> Any:
        if self._lm is None:
            raise RFTError("The engine is not running: call start() first.")
        if self._torn:
            raise TransportError("The last load failed half-way: old and new weights are mixed. Load a whole version.")
        return self._lm(**inputs)

    def _next_logits(self, rows: list[Running]) -> torch.Tensor:
        """Runs the model on what the cache does not hold yet; returns fp32 logits of the next tokens, [rows, vocab]."""
        import torch

        with torch.inference_mode():
            self._reuse_cache(rows)
            cache, self._cache = self._cache, None  # a forward that fails half-way leaves nothing to go on from
            if cache is None or self._mask is None:
                contents = [[*running.request.prompt_ids, *running.token_ids] for running in rows]
                length = max(map(len, contents))
                ids = torch.tensor([[0] * (length - len(row)) + row for row in contents], device=self._device)
                lengths = torch.tensor([len(row) for row in contents], device=self._device)
                columns = torch.arange(length, device=self._device)
                self._mask = (columns >= length - lengths[:, None]).long()
            else:
                ids = torch.tensor([running.token_ids[-1:] for running in rows], device=self._device)
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

    def _reuse_cache(self, rows: list[Running]) -> None:
        """Drops rows that have ended from the cache, or the whole cache if others have joined."""
        import torch

        kept = [row for row, running in enumerate(self._rows) if self._running.get(running.request.id) is running]
        if len(kept) < len(rows):
            self._cache = None
        elif len(kept) < len(self._rows):
            if self._mask is not None and _rows_selectable(self._cache):
                index = torch.tensor(kept, device=self._device)
                self._cache.batch_select_indices(index)
                self._mask = self._mask[index]
            else:
                self._cache = None
        self._rows = rows

    def _sample(self, rows: list[Running], logits: torch.Tensor) -> tuple[list[int], list[float]]:
        """Draws a token id for each row of ``logits`` [rows, vocab], from its request's own numbers; with log-probs."""
        import torch

        from lightning_rft.explorer.engines.processing import choices, drawn_from

        with torch.inference_mode():
            greedy = torch.tensor([not running.request.sampling.temperature for running in rows], device=self._device)
            logprobs = drawn_from(logits, rows, self._eos)
            for running, row in zip(rows, logprobs, strict=True):
                if running.request.sampling.keeps_support:
                    running.choose_from(choices(row))
            # Inverse of the cumulative distribution: one number per token whatever the batch and the device. In
            # float64, since in float32 the sum over a large vocabulary would round rare tokens away.
            cumulative = logprobs.double().exp().cumsum(-1)
            numbers = [[running.rng.random()] for running in rows]
            uniform = torch.tensor(numbers, dtype=torch.float64, device=self._device)
            drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
            drawn = drawn.clamp(max=logits.shape[-1] - 1)
            chosen = torch.where(greedy[:, None], logprobs.argmax(-1, keepdim=True), drawn)
            return chosen[:, 0].tolist(), logprobs.gather(-1, chosen)[:, 0].tolist()


def _rows_selectable(cache: Any) -> bool:
    """Whether ``batch_select_indices`` is known to reach all of a cache's state, which it does not for SSM layers."""
    from transformers import cache_utils

    known = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in known for layer in layers)
