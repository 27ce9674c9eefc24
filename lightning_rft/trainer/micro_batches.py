"""Micro-batches: the turns of a batch, cut so that each part fits the memory and all ranks have the same work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from lightning_rft.experience import Turn
from lightning_rft.trainer.weighted import WeightedTurn

__all__ = ["by_group", "micro_batches", "split_samples"]

Cut = list[list[WeightedTurn]]


def micro_batches(
    turns: Sequence[WeightedTurn],
    shares: int,
    *,
    max_tokens: int | None,
    columns: Callable[[list[list[Turn]]], int],
    shared: bool,
) -> list[Cut]:
    """The micro-batches of each share, of which all have the same number, perhaps with some that are empty.

    Turns are cut into the fewest pieces with about as many tokens each whose rows have at most ``max_tokens`` columns,
    padding included; a turn that is longer is a piece of its own. ``columns`` counts those of groups of turns, and
    ``shared`` says whether turns with the same prompt share rows, so that they are better left together.
    """
    ordered = _ordered(turns, shared)
    sizes = [turn.turn.num_tokens + (0 if shared else len(turn.turn.prompt_ids)) for turn in ordered]
    count = shares
    if max_tokens is not None and ordered:
        count = max(1, columns(by_group(ordered)) // max_tokens // shares) * shares
    while True:
        pieces = _pieces(ordered, sizes, count)
        if max_tokens is None or all(len(piece) < 2 or columns(by_group(piece)) <= max_tokens for piece in pieces):
            break
        count += shares
    # neighbours, which are about as long, go to different shares
    return [pieces[share::shares] for share in range(shares)]


def by_group(turns: Sequence[WeightedTurn]) -> list[list[Turn]]:
    """The turns, group by group."""
    return [[turn.turn for turn in group] for _, group in groupby(turns, key=lambda turn: turn.group)]


def split_samples(shares: Sequence[Cut]) -> set[int]:
    """The samples whose turns lie in several micro-batches."""
    homes: dict[int, int] = {}
    split: set[int] = set()
    for index, piece in enumerate(piece for share in shares for piece in share):
        split.update(turn.sample for turn in piece if homes.setdefault(turn.sample, index) != index)
    return split


def _ordered(turns: Sequence[WeightedTurn], shared: bool) -> list[WeightedTurn]:
    """The longest first, since a row of any length costs as much as the longest beside it."""
    if not shared:
        return sorted(turns, key=lambda turn: -len(turn.turn.prompt_ids) - turn.turn.num_tokens)
    groups = [list(group) for _, group in groupby(turns, key=lambda turn: turn.group)]
    groups.sort(key=lambda group: -sum(turn.turn.num_tokens for turn in group))
    return [turn for group in groups for turn in group]


def _pieces(turns: Sequence[WeightedTurn], sizes: Sequence[int], count: int) -> Cut:
    pieces: Cut = [[] for _ in range(count)]
    total, end = sum(sizes), 0
    for turn, size in zip(turns, sizes, strict=True):
        end += size
        pieces[(2 * end - size) * count // (2 * total)].append(turn)  # where its middle is
    return pieces
