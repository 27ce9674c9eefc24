"""What samples have sampled that are still explored: parts of their calls, as they travel to rank 0 and back."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from operator import itemgetter

from lightning_rft.errors import ScheduleError
from lightning_rft.turn import Support, Turn

__all__ = ["Part", "joined", "stretch", "up_to"]


@dataclass(frozen=True)
class Part:
    """Tokens that one call of a sample has sampled."""

    sample: int  # its index in the group
    call: bytes  # which of its calls: the fingerprint of the request
    start: int  # how many tokens come before
    tokens: Turn  # without the prompt; the finish reason is empty if others follow


def joined(parts: Sequence[Part]) -> Turn:
    """The tokens of a call's parts, of which a long answer has thousands."""
    length = 0
    for part in parts:
        if part.start != length:
            raise ScheduleError(f"tokens from {part.start} on came after {length} of their answer")
        length += part.tokens.num_tokens
    turns = [part.tokens for part in parts]
    supports = [turn.support.packed() for turn in turns if turn.support is not None]
    runs = groupby(chain.from_iterable(turn.version_runs for turn in turns), key=itemgetter(0))
    merged = ((version, sum(count for _, count in each)) for version, each in runs)
    return Turn(
        (),
        b"".join(turn.token_ids.tobytes() for turn in turns),
        b"".join(turn.logprobs.tobytes() for turn in turns),
        array("i", chain.from_iterable(merged)).tobytes(),
        turns[-1].finish_reason if turns else "",
        support=Support(*map(b"".join, zip(*supports, strict=True))) if supports else None,
    )


def up_to(tokens: Turn, version: int) -> Turn:
    """The tokens before the first that newer weights have sampled; as they are if there is none."""
    return stretch(tokens, 0, sum(count for _, count in takewhile(lambda run: run[0] <= version, tokens.version_runs)))


def stretch(tokens: Turn, start: int, stop: int) -> Turn:
    """The tokens from ``start`` to ``stop``; they end the answer if they are its last."""
    if (start, stop) == (0, tokens.num_tokens):
        return tokens
    support = tokens.support
    if support is not None:
        first, last = int(support.counts[:start].sum()), int(support.counts[:stop].sum())
        kept = support.counts[start:stop], support.token_ids[first:last], support.logprobs[first:last]
        support = Support(*(array.tobytes() for array in kept))
    ids, logprobs = tokens.token_ids[start:stop].tobytes(), tokens.logprobs[start:stop].tobytes()
    reason = tokens.finish_reason if stop == tokens.num_tokens else ""
    return Turn((), ids, logprobs, tokens.versions[start:stop].tolist(), reason, support=support)
