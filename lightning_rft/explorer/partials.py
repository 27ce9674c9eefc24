"""What samples have sampled that are still explored: parts of their calls, as they travel to rank 0 and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from lightning_rft.errors import ScheduleError
from lightning_rft.turn import Support, Turn

__all__ = ["Part", "joined", "up_to"]


@dataclass(frozen=True)
class Part:
    """Tokens that one call of a sample has sampled."""

    sample: int  # its index in the group
    call: bytes  # which of its calls: the fingerprint of the request
    start: int  # how many tokens come before
    tokens: Turn  # without the prompt; the finish reason is empty if others follow


def joined(parts: Iterable[Part]) -> Turn:
    """The tokens of a call's parts."""
    whole = Turn((), (), (), (), "")
    for part in parts:
        if part.start != whole.num_tokens:
            raise ScheduleError(f"tokens from {part.start} on came after {whole.num_tokens} of their answer")
        whole = _followed(whole, part.tokens)
    return whole


def up_to(tokens: Turn, version: int) -> Turn:
    """The tokens before the first that newer weights have sampled; as they are if there is none."""
    length = sum(count for _, count in takewhile(lambda run: run[0] <= version, tokens.version_runs))
    if length == tokens.num_tokens:
        return tokens
    support = tokens.support
    if support is not None:
        choices = int(support.counts[:length].sum())
        kept = support.counts[:length], support.token_ids[:choices], support.logprobs[:choices]
        support = Support(*(array.tobytes() for array in kept))
    ids, logprobs = tokens.token_ids[:length].tobytes(), tokens.logprobs[:length].tobytes()
    return Turn((), ids, logprobs, tokens.versions[:length].tolist(), "", support=support)


def _followed(first: Turn, then: Turn) -> Turn:
    """All tokens of both."""
    if not first.num_tokens:
        return then
    support = then.support
    if first.support is not None and support is not None:
        support = Support(*(a + b for a, b in zip(first.support.packed(), support.packed(), strict=True)))
    ids = first.token_ids.tobytes() + then.token_ids.tobytes()
    logprobs = first.logprobs.tobytes() + then.logprobs.tobytes()
    versions = [*first.versions.tolist(), *then.versions.tolist()]
    return Turn((), ids, logprobs, versions, then.finish_reason, support=support)
