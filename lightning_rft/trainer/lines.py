"""Lines: what the calls of a group read and sampled, each common beginning found by its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_rft.experience import Turn

__all__ = ["Lines", "find_lines"]

_BYTES = 4  # of a token


@dataclass(frozen=True)
class Lines:
    """The lines of groups of turns, those of a group one after another and depth first.

    A line is a turn's prompt and answer without the last token, from which nothing is predicted. A turn whose line
    begins another's lies in that one: all turns of a conversation lie in the line of the last. Neighbours have more in
    common than others: the columns that two lines have in common are the least of ``common`` behind the first of them.
    """

    #: The turns that lie in each line, by their index in all groups.
    turns: list[list[int]]
    #: Index of each line's group.
    group: NDArray[np.int64]
    #: Tokens of each line.
    lengths: NDArray[np.int64]
    #: The tokens with which each begins like the line before it; 0 for the first of a group.
    common: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.turns)

    def alike(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first of each run of lines that begin alike, and the tokens with which all lines of that run begin."""
        first = np.flatnonzero(self.common == 0)
        return first, np.minimum.reduceat(np.where(self.common == 0, self.lengths, self.common), first)

    def take(self, chosen: NDArray[np.int64]) -> Lines:
        """Some lines: whole groups of them, or neighbours."""
        common = self.common[chosen]
        common[:1] = 0
        return Lines([self.turns[index] for index in chosen], self.group[chosen], self.lengths[chosen], common)


def find_lines(groups: Sequence[Sequence[Turn]]) -> Lines:
    """The lines of turns that have a sampled token each."""
    turns: list[list[int]] = []
    found: list[tuple[int, int, int]] = []
    first = 0
    for number, group in enumerate(groups):
        texts = [(_line(turn), first + index) for index, turn in enumerate(group)]
        first += len(group)
        before = None
        for text, index in sorted(texts):
            if before is not None and text.startswith(before):
                turns[-1].append(index)
                found[-1] = (number, len(text) // _BYTES, found[-1][2])
            else:
                turns.append([index])
                found.append((number, len(text) // _BYTES, 0 if before is None else _common(before, text)))
            before = text
    group_of, lengths, common = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return Lines(turns, group_of, lengths, common)


def _line(turn: Turn) -> bytes:
    return turn._prompt_ids + turn._token_ids[:-_BYTES]


def _common(one: bytes, other: bytes) -> int:
    """Tokens with which both begin, of lines that differ before either ends."""
    size = min(len(one), len(other)) // _BYTES
    a, b = (np.frombuffer(line, np.int32, count=size) for line in (one, other))
    return int((a != b).argmax())
