"""Micro-batches: the turns of a batch, cut so that each part fits the memory and all ranks have the same work.

What is moved is a line with all turns that lie in it: a turn alone would have the columns of those before it computed
once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_rft.experience import Turn
from lightning_rft.trainer.lines import Lines, find_lines
from lightning_rft.trainer.weighted import WeightedTurn

__all__ = ["by_group", "micro_batches", "split_samples"]

Cut = list[list[WeightedTurn]]


def micro_batches(
    turns: Sequence[WeightedTurn],
    shares: int,
    *,
    max_tokens: int | None,
    columns: Callable[[Lines], int],
    shared: bool,
) -> list[Cut]:
    """The micro-batches of each share, of which all have the same number, perhaps with an empty one in the end.

    Each share is one micro-batch with about as many tokens as the others, if those keep to ``max_tokens`` columns,
    padding included. Else micro-batches are filled up to that, one after another; a line that is longer is one of its
    own. ``columns`` counts those of lines, and ``shared`` says whether lines that begin alike share rows, so that they
    are better left together.
    """
    found = find_lines(by_group(turns))
    lines = found.take(_order(found, shared))

    def fits(part: range) -> bool:
        return max_tokens is None or len(part) < 2 or columns(lines.take(np.array(part))) <= max_tokens

    parts = _alike(_sizes(lines) if shared else lines.lengths, shares)
    if not all(map(fits, parts)):
        parts = _filled(len(lines), fits)
        parts += [range(0)] * (-len(parts) % shares)
    pieces = [[turns[index] for line in part for index in lines.turns[line]] for part in parts]
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


def _order(lines: Lines, shared: bool) -> NDArray[np.int64]:
    """The longest first, since a row of any length costs as much as the longest beside it."""
    if not shared:
        return np.argsort(-lines.lengths, kind="stable")
    of_groups = np.bincount(lines.group, lines.lengths - lines.common)
    return np.argsort(-of_groups[lines.group], kind="stable")


def _sizes(lines: Lines) -> NDArray[np.float64]:
    """Columns that each line adds to those before it; what all of a run begin with is divided among them."""
    first, root = lines.alike()
    count = np.diff(first, append=len(lines))
    root, share = np.repeat(root, count), np.repeat(root / count, count)
    return lines.lengths - np.maximum(lines.common, root) + share


def _alike(sizes: NDArray[Any], count: int) -> list[range]:
    """Parts of about the same size."""
    ends = np.cumsum(sizes)
    part = (ends - sizes / 2) * count // ends[-1:]  # where its middle is
    cuts = np.searchsorted(part, np.arange(1, count))
    return [range(start, end) for start, end in pairwise([0, *cuts.tolist(), len(sizes)])]


def _filled(count: int, fits: Callable[[range], bool]) -> list[range]:
    """Parts with as many lines as fit, one after another."""
    parts: list[range] = []
    start = 0
    while start < count:
        most, too_many = 1, 2
        while start + too_many <= count and fits(range(start, start + too_many)):
            most, too_many = too_many, 2 * too_many
        too_many = min(too_many, count - start + 1)
        while too_many - most > 1:
            middle = (most + too_many) // 2
            most, too_many = (middle, too_many) if fits(range(start, start + middle)) else (most, middle)
        parts.append(range(start, start + most))
        start += most
    return parts
