"""Translation of how to sample, and of what was sampled from, between this package and vLLM."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_rft.explorer.engines.requests import Running
from lightning_rft.sampling import BAN, Sampling

if TYPE_CHECKING:
    from vllm import SamplingParams

__all__ = ["EQUALS", "choices", "rest", "sampling_params"]

# Of the tokens that are as likely as the k-th, vLLM's sampler for CPUs keeps all, which in half precision are some more
# than k, rarely more than by so many.
EQUALS = 16


def sampling_params(sampling: Sampling, ends: Iterable[int], *, listed: int) -> SamplingParams:
    """The value for vLLM, with log-probs of ``listed`` tokens; ``ends`` are the ids that end any answer."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    top_k, top_p, min_p = sampling.truncation
    biases = sampling.logit_bias or {}
    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens or 0,
        seed=sampling.seed,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        logprobs=listed,
        stop_token_ids=[*ends, *(sampling.stop_token_ids or ())],
        ignore_eos=True,  # what ends an answer is listed
        logit_bias={token: bias if bias > BAN else -math.inf for token, bias in biases.items()} or None,
        structured_outputs=StructuredOutputsParams(**sampling.structured) if sampling.structured else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def choices(entry: Mapping[int, Any]) -> dict[int, float]:
    """The ids that a token was chosen from with their log-probs, given vLLM's list of the most likely ones."""
    logprobs = {token: one.logprob for token, one in entry.items()}
    return {token: logprob for token, logprob in logprobs.items() if logprob > -math.inf}


def rest(running: Running) -> Sampling:
    """How what is left of a request is sampled, which vLLM takes for a request of its own."""
    sampling, kept = running.request.sampling, len(running.token_ids)
    if not kept:
        return sampling
    least = max(0, (sampling.min_new_tokens or 0) - kept)
    # With the same seed, its first tokens would be drawn by the numbers that have drawn what was kept.
    seed = running.rng.getrandbits(31)
    return replace(sampling, max_new_tokens=running.limit - kept, min_new_tokens=least, seed=seed)
