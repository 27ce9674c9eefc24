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
    """The micro-batches of each share, of which all have the same number, perhaps with an empty one in the end.

    Each share is one micro-batch with about as many tokens as the others, if those keep to ``max_tokens`` columns,
    padding included. Else micro-batches are filled up to that, one after another; a turn that is longer is one of its
    own. ``columns`` counts those of groups of turns, and ``shared`` says whether turns with the same prompt share rows,
    so that they are better left together.
    """

    def fits(piece: Sequence[WeightedTurn]) -> bool:
        return max_tokens is None or len(piece) < 2 or columns(by_group(piece)) <= max_tokens

    ordered = _ordered(turns, shared)
    sizes = [turn.turn.num_tokens + (0 if shared else len(turn.turn.prompt_ids)) for turn in ordered]
    pieces = _alike(ordered, sizes, shares)
    if not all(map(fits, pieces)):
        pieces = _filled(ordered, fits)
        pieces += [[] for _ in range(-len(pieces) % shares)]
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


def _alike(turns: Sequence[WeightedTurn], sizes: Sequence[int], count: int) -> Cut:
    """Pieces of about the same size."""
    pieces: Cut = [[] for _ in range(count)]
    total, end = sum(sizes), 0
    for turn, size in zip(turns, sizes, strict=True):
        end += size
        pieces[(2 * end - size) * count // (2 * total)].append(turn)  # where its middle is
    return pieces


def _filled(turns: Sequence[WeightedTurn], fits: Callable[[Sequence[WeightedTurn]], bool]) -> Cut:
    """Pieces with as many turns as fit, one after another."""
    pieces: Cut = []
    left = list(turns)
    while left:
        most, too_many = 1, 2
        while too_many <= len(left) and fits(left[:too_many]):
            most, too_many = too_many, 2 * too_many
        too_many = min(too_many, len(left) + 1)
        while too_many - most > 1:
            middle = (most + too_many) // 2
            most, too_many = (middle, too_many) if fits(left[:middle]) else (most, middle)
        pieces.append(left[:most])
        left = left[most:]
    return pieces
