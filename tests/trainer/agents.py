"""Random trees of calls, as agents make them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lightning_rft.experience import Turn


def agents(draw: random.Random, samples: int = 3, calls: int = 4, ids: Sequence[int] = (5, 6, 7)) -> list[Turn]:
    """The calls of some samples that begin with the same prompt, in random order.

    A call goes on from all that an earlier one read and wrote, in its own sample or another, with something observed;
    or from a part of that (compaction, an answer that was cut); or from its prompt alone (a retry, a parallel call); or
    it has a prompt of its own (a sub-agent). With few ids, texts begin alike by chance too, and calls are equal.
    """

    def some(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.choice(ids) for _ in range(draw.randint(least, most)))

    prompt = some(1, 4)
    turns: list[Turn] = []
    for _ in range(draw.randint(1, samples)):
        made = [_call(prompt, some(0, 5))]
        for _ in range(draw.randint(0, calls - 1)):
            last = draw.choice([made[-1], made[-1], draw.choice(made)])
            asked, text = tuple(last.prompt_ids.tolist()), (*last.prompt_ids.tolist(), *last.token_ids.tolist())
            read = {
                "goes on": text + some(0, 3),
                "compaction": text[: draw.randint(1, len(text))] + some(0, 3),
                "again": asked,
                "sub-agent": some(1, 4),
            }
            how = draw.choice(["goes on", "goes on", "goes on", "compaction", "again", "sub-agent"])
            made.append(_call(read[how], some(0, 5)))
        turns += made
    draw.shuffle(turns)
    return turns


def lines_of(turns: Sequence[Turn]) -> set[tuple[int, ...]]:
    """What must be computed for some turns: texts up to the last token, less those with which another begins."""
    texts = {(*turn.prompt_ids.tolist(), *turn.token_ids[:-1].tolist()) for turn in turns if turn.num_tokens}
    return {text for text in texts if not any(other != text and other[: len(text)] == text for other in texts)}


def _call(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Turn:
    nothing = (0,) * len(tokens)
    return Turn(prompt, tokens, nothing, nothing, "stop")
