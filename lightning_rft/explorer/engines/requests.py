"""Requests to an engine: what is asked, what was sampled of it so far, and what came of it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from lightning_rft.experience import Support
from lightning_rft.sampling import Sampling

__all__ = ["Completion", "Request", "Running"]


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    id: str  #: Unique among the running requests.
    prompt_ids: tuple[int, ...]
    #: With ``max_new_tokens`` and ``temperature``. The seed is of the request's own random numbers: the answer does not
    #: depend on its neighbours.
    sampling: Sampling
    kept: Completion | None = None  #: What was sampled of it before, elsewhere: the answer begins with it.

    @cached_property
    def fingerprint(self) -> bytes:
        """Equal for requests that ask for the same: the same prompt, sampled in the same way from the same seed."""
        prompt = array("i", self.prompt_ids).tobytes()
        return blake2b(repr(self.sampling).encode(errors="backslashreplace") + prompt, digest_size=16).digest()


@dataclass(frozen=True)
class Completion:
    """The answer to a :class:`Request`; the three tuples are equally long."""

    request_id: str
    token_ids: tuple[int, ...]  #: The end-of-sequence token included, when it was sampled.
    logprobs: tuple[float, ...]  #: Natural, of the distribution that was drawn from.
    versions: tuple[int, ...]  #: Of the weights that sampled each token.
    finish_reason: str  #: ``"stop"`` or ``"length"``; empty of a part to which others will be added.
    support: Support | None = None  #: What each token was chosen from, where the sampling keeps that.


@dataclass(eq=False)
class Running:
    """A request and what it has sampled so far; the three lists are equally long."""

    request: Request
    limit: int  #: Maximum tokens to sample.
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    # Of the tokens to choose from, where the sampling keeps them: how many for each token, their ids and log-probs.
    counts: array[int] = field(default_factory=lambda: array("i"))
    choice_ids: array[int] = field(default_factory=lambda: array("i"))
    choice_logprobs: array[float] = field(default_factory=lambda: array("f"))
    cut: bool = False  #: Whether its next token is its last.

    @cached_property
    def rng(self) -> random.Random:
        """The request's own random numbers."""
        # Not a torch.Generator: on a CPU that one reads only the low 32 bits of its seed.
        return random.Random(self.request.sampling.seed)

    def extend(self, token_ids: Sequence[int], logprobs: Iterable[float], version: int) -> None:
        """Adds what one step sampled."""
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.versions += [version] * len(token_ids)

    def choose_from(self, choices: Mapping[int, float]) -> None:
        """Keeps the ids that a token was chosen from, with their log-probs."""
        self.counts.append(len(choices))
        self.choice_ids.extend(choices)
        self.choice_logprobs.extend(choices.values())

    def resume(self, kept: Completion) -> None:
        """Begins with what was sampled elsewhere, and with the random numbers that come next: one for each token."""
        self.token_ids += kept.token_ids
        self.logprobs += kept.logprobs
        self.versions += kept.versions
        if kept.support is not None:
            self.counts.extend(kept.support.counts.tolist())
            self.choice_ids.extend(kept.support.token_ids.tolist())
            self.choice_logprobs.extend(kept.support.logprobs.tolist())
        for _ in kept.token_ids:
            self.rng.random()

    def completion(self, finish_reason: str, start: int = 0) -> Completion:
        """What it has sampled, from its ``start``-th token on."""
        support = None
        if self.request.sampling.keeps_support:
            before = sum(self.counts[:start])
            support = Support(self.counts[start:], self.choice_ids[before:], self.choice_logprobs[before:])
        tokens = tuple(self.token_ids[start:]), tuple(self.logprobs[start:]), tuple(self.versions[start:])
        return Completion(self.request.id, *tokens, finish_reason, support)
