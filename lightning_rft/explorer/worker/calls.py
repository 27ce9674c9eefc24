"""The calls of a group: what rank 0 is told of them if it takes long, and what it kept of those of a dead explorer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.partials import Part, stretch, up_to
from lightning_rft.turn import Turn

__all__ = ["Call", "go_on", "news"]


@dataclass(eq=False)
class Call:
    """One call of the policy, on its way through the engine."""

    sample: int
    request: Request
    told: int = 0  # how many of its tokens rank 0 was told of
    done: Completion | None = None


def go_on(call: Call, kept: Mapping[tuple[int, bytes], Turn], version: int) -> None:
    """Gives a call what was kept of it, if it was: tokens before the first of weights newer than ``version``.

    Those would be followed by tokens of older weights.
    """
    tokens = kept.get((call.sample, call.request.fingerprint))
    if tokens is None:
        return
    tokens = up_to(tokens, version)
    completion = Completion(
        call.request.id,
        tuple(tokens.token_ids.tolist()),
        tuple(tokens.logprobs.tolist()),
        tuple(tokens.versions.tolist()),
        tokens.finish_reason,
        tokens.support,
    )
    if tokens.finish_reason:
        call.done = completion
    elif tokens.num_tokens and not call.request.sampling.structured:  # a grammar would begin once more
        call.request = replace(call.request, kept=completion)


def news(calls: dict[str, Call], sampled: Mapping[str, Completion]) -> Iterator[Part]:
    """What rank 0 is to be told of calls, given what each has ``sampled`` since; those that are done are forgotten."""
    for name, call in list(calls.items()):
        if call.done is not None:
            del calls[name]
            answer = _turn(call.done)
            yield _part(call, stretch(answer, call.told, answer.num_tokens))
        elif name in sampled:
            tokens = _turn(sampled[name])
            yield _part(call, tokens)
            call.told += tokens.num_tokens


def _part(call: Call, tokens: Turn) -> Part:
    return Part(call.sample, call.request.fingerprint, call.told, tokens)


def _turn(tokens: Completion) -> Turn:
    return Turn((), tokens.token_ids, tokens.logprobs, tokens.versions, tokens.finish_reason, support=tokens.support)
