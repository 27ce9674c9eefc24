"""Layouts of lines in rows: the one that is computed soonest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_rft.trainer.lines import Lines

__all__ = ["Layout", "layout"]

_CAUSAL = 0.5  # time of causal attention, for which the kernels are made, over that of attention with a mask
_WORTH = 0.95  # of the time of ordinary rows; for less gain they stay
# Of a shared row's mask: one of 32k tokens in half precision. Rows that are computed sooner, as far as that, need less
# memory too, the mask included; wider ones have not been thought through.
_MASK_BYTES = 2**31


class Layout(NamedTuple):
    """Rows of the same width, of which some hold several lines."""

    row: Sequence[int]  # of each line
    common: Sequence[int]  # columns that each shares with the line before it in its row
    rows: int
    width: int

    @property
    def shared(self) -> bool:
        """Whether any row holds several lines, so that a mask must keep them apart."""
        return self.rows < len(self.row)

    @property
    def columns(self) -> int:
        """Of all rows, padding included."""
        return self.rows * self.width


def layout(
    lines: Lines,
    *,
    shared: bool,
    mask_dtype: torch.dtype = torch.float32,
    balance: float = 3000.0,
    multiple: int = 1,
) -> Layout:
    """Rows for lines: one for each, or with ``shared`` one for several of a group where that is computed sooner.

    The settings are those of :func:`~lightning_rft.trainer.packing.pack`.
    """
    count, widest = len(lines), int(lines.lengths.max(initial=0))
    best = Layout(range(count), [0] * count, count, widest)
    if not shared or not count:
        return best
    least = _WORTH * best.columns * (balance + _CAUSAL * widest)
    first, root = lines.alike()
    added = np.add.reduceat(lines.lengths - lines.common, first)
    # All rows are as wide as the widest, so what is chosen is that width: where some row is just full.
    widths = np.unique(-(-np.maximum(_full(lines, first), widest) // multiple) * multiple)
    widths = widths[widths**2 * mask_dtype.itemsize <= _MASK_BYTES]
    # From the least number of rows at each width follows which are not worth filling.
    room = np.maximum(widths[:, None] - root, 1)
    bounds = np.maximum(1, -(-(added - root) // room)).sum(1) * widths * (balance + widths)
    lengths, common = lines.lengths.tolist(), lines.common.tolist()
    for bound, width in sorted(zip(bounds.tolist(), widths.tolist(), strict=True)):
        if bound >= least:
            break
        filled = _fill(lengths, common, width)
        cost = filled.columns * (balance + width)
        if cost < least:
            best, least = filled, cost
    return best


def _full(lines: Lines, first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Widths of rows that are filled, one line after another, from the first of those with a common beginning."""
    added = np.cumsum(lines.lengths - lines.common)
    before = (added - lines.lengths)[first]  # the first adds all of itself
    return added - np.repeat(before, np.diff(first, append=len(added)))


def _fill(lengths: Sequence[int], common: Sequence[int], width: int) -> Layout:
    """Each line in the row within this width that it shares most with, or in a new one."""
    row: list[int] = []
    shared: list[int] = []
    used: list[int] = []
    alike: list[int] = []  # columns of each row's last line that this line begins with
    first = 0
    for length, begins in zip(lengths, common, strict=True):
        if not begins:
            first = len(used)
        best, most = len(used), 0
        for r in range(first, len(used)):
            alike[r] = min(alike[r], begins)
            if alike[r] > most and used[r] + length - alike[r] <= width:
                best, most = r, alike[r]
        if best == len(used):
            used.append(0)
            alike.append(0)
        used[best] += length - most
        alike[best] = length
        row.append(best)
        shared.append(most)
    return Layout(row, shared, len(used), width)
