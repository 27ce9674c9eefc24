"""Log-probabilities of targets under a linear output head, without holding the logits of all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["LogitTransform", "chunk_tokens", "linear_logprobs", "outside"]

_CHUNK_BYTES = 2**30  # of the fp32 logits that are made at a time, of which two to three such tensors live at once
# On CPUs: with half as many, adding to the weight's gradient takes a third longer in bf16; with twice as many the whole
# is at most a tenth faster, for twice the memory.
_CPU_CHUNK = 256


@dataclass(frozen=True)
class LogitTransform:
    """Logits z from an output head's x: ``scale * x`` or, with a cap c, ``c * tanh(scale * x / c)``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Transforms logits in place."""
        if self.scale != 1:
            logits *= self.scale
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are made at a time."""
    return _CPU_CHUNK if device.type == "cpu" else max(1, _CHUNK_BYTES // (4 * vocabulary))


def outside(support: Tensor, vocabulary: int) -> Tensor:
    """Whether each id of the vocabulary is none of those that a token was chosen from [n, V].

    ``support`` holds these [n, K]; its row begins with -1 where all could be.
    """
    kept = (support[:, :1] < 0).repeat(1, vocabulary)
    return kept.scatter_(-1, support.long().clamp_(min=0), True).logical_not_()


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    temperature: Tensor | None = None,
    support: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under ``softmax(transform(hidden @ weight.T + bias) / temperature)``; entropy.

    ``hidden`` is [N, H], ``weight`` [V, H], ``bias`` [V], ``target`` [N] in int64, ``temperature`` [N], or ``None`` for
    1. The softmax is over ``support`` [N, K] (see :func:`outside`), or ``None`` for the whole vocabulary. Both results
    are [N] in nats and float32, and differentiable once, the entropies only with ``entropy_gradient``. Logits are
    computed some hundred tokens at a time, discarded, and computed again in the backward pass, where the gradient of a
    token's logits is ``(onehot(target) - p) / temperature`` times the gradient of its log-probability (the fused linear
    cross entropy of `Liger <https://arxiv.org/abs/2410.10989>`_, for one number per token), and ``-p * (log p + H) /
    temperature`` times that of its entropy H. Matrices are multiplied in the dtype of ``torch.autocast`` where it is
    on; softmax, and the sum of the weight's gradient over the chunks, are in float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    logprobs, entropy = _LinearLogprobs.apply(
        hidden, weight, bias, target, temperature, support, transform, dtype, entropy_gradient
    )
    return logprobs, entropy


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: Tensor | None,
        support: Tensor | None,
        transform: LogitTransform,
        dtype: torch.dtype,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = torch.empty(2, len(hidden), device=hidden.device, dtype=torch.float32).unbind()
        probabilities = None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(dtype)
            for part in _parts(hidden, weight):
                logits = _logits(
                    hidden[part].to(dtype), head, bias, transform, _of(temperature, part), _of(support, part)
                )
                # Few passes over the logits: on CPUs more would take as long as the multiplication.
                largest, index = logits.max(-1, keepdim=True)
                probabilities = logits.softmax(-1)
                normaliser = (largest - probabilities.gather(-1, index).log())[:, 0]
                logprobs[part] = logits.gather(-1, target[part, None])[:, 0] - normaliser
                entropy[part] = normaliser - torch.linalg.vecdot(probabilities, logits)
        ctx.save_for_backward(hidden, weight, bias, target, temperature, support, entropy if entropy_gradient else None)
        # Backward begins with this part, often the only one, and need not compute it again.
        ctx.last = probabilities if transform.cap is None else None
        ctx.transform = transform
        ctx.dtype = dtype
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, to_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, temperature, support, entropy = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight: Tensor | None = None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        scale = -upstream.float() if entropy is None else torch.ones_like(upstream, dtype=torch.float32)
        scale = scale * ctx.transform.scale
        if temperature is not None:
            scale = scale / temperature
        errors, ctx.last = ctx.last, None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(ctx.dtype)
            for part in reversed(_parts(hidden, weight)):
                inputs = hidden[part].to(ctx.dtype)
                if errors is None:
                    logits = _logits(inputs, head, bias, ctx.transform, _of(temperature, part), _of(support, part))
                    errors = logits.softmax(-1)
                if entropy is not None:
                    flatter = torch.special.entr(errors).addcmul_(errors, entropy[part, None], value=-1)
                errors.scatter_add_(
                    -1, target[part, None], torch.full_like(target[part, None], -1, dtype=torch.float32)
                )
                if entropy is not None:
                    errors.mul_(-upstream[part, None]).addcmul_(flatter, to_entropy[part, None])
                if ctx.transform.cap is not None:
                    if temperature is not None:
                        logits *= temperature[part, None]
                    # no larger than 1 but outside of the support, where the error is 0
                    errors *= 1 - logits.div_(ctx.transform.cap).square_().clamp_(max=1)
                # The upstream gradient scales the small matrices, not the one that is as wide as the vocabulary.
                if to_bias is not None:
                    to_bias += scale[part] @ errors
                errors = errors.to(ctx.dtype)
                if to_hidden is not None:
                    to_hidden[part] = (errors @ head) * scale[part, None]
                if wants_weight:
                    scaled = (inputs * scale[part, None]).to(ctx.dtype)
                    if to_weight is None:
                        to_weight = (errors.T @ scaled).float()
                    elif ctx.dtype == torch.float32:
                        to_weight.addmm_(errors.T, scaled)
                    else:
                        to_weight += errors.T @ scaled
                errors = None
        to_weight = None if to_weight is None else to_weight.to(weight.dtype)
        to_bias = None if to_bias is None else to_bias.to(bias.dtype)
        return to_hidden, to_weight, to_bias, None, None, None, None, None, None


def _parts(hidden: Tensor, weight: Tensor) -> list[slice]:
    chunk = chunk_tokens(len(weight), hidden.device)
    return [slice(start, start + chunk) for start in range(0, len(hidden), chunk)]


def _of(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]


def _logits(
    inputs: Tensor,
    head: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    temperature: Tensor | None,
    support: Tensor | None,
) -> Tensor:
    """Logits [tokens, V], float32, in memory of their own."""
    logits = (inputs @ head.T).float()
    if bias is not None:
        logits += bias
    logits = transform(logits)
    if temperature is not None:
        logits /= temperature[:, None]
    lowest = torch.finfo(torch.float32).min
    if support is not None:
        logits.masked_fill_(outside(support, logits.shape[-1]), lowest)
    # A bias of -inf keeps a token from being sampled; times its probability, 0, it would be NaN.
    return logits if bias is None else logits.clamp_(min=lowest)
