"""Normalisation: how much each token counts, which follows from the lengths of the batch's samples alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Normalisation", "token_weights"]

#: ``"token"``: every token of the batch counts the same. ``"sequence"``: every sample counts the same, and its tokens
#: share that. ``"group"``: every group counts the same. ``"constant"``, or a number: the sum over a sample's tokens is
#: divided by ``max_new_tokens``, or by that number, and samples are averaged.
Normalisation = Literal["token", "sequence", "group", "constant"] | int


def token_weights(lengths: Tensor, groups: Tensor, by: Normalisation, max_new_tokens: int) -> Tensor:
    """The weight of each token of each sample [S], float64; with losses of 1 the weighted sum over tokens is 1.

    That holds for all but constants, whose weights sum up to 1 where every sample has as many tokens as the constant.

    Args:
        lengths: Sampled tokens of each sample [S].
        groups: Which group each sample belongs to [S], int64.
        by: What is normalised by.
        max_new_tokens: What ``"constant"`` stands for.

    Example:
        >>> lengths, groups = torch.tensor([1, 3, 4]), torch.tensor([0, 0, 1])
        >>> token_weights(lengths, groups, "sequence", 8) * 3
        tensor([1.0000, 0.3333, 0.2500], dtype=torch.float64)
        >>> token_weights(lengths, groups, "group", 8) * 2
        tensor([0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    lengths = lengths.double()
    if by == "token":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    if by == "sequence":
        return 1 / (lengths.clamp(min=1) * len(lengths))
    if by == "group":
        names, index = torch.unique(groups, return_inverse=True)
        tokens = lengths.new_zeros(len(names)).index_add(0, index, lengths)
        return 1 / (tokens.clamp(min=1)[index] * len(names))
    return torch.full_like(lengths, 1 / (max(1, len(lengths)) * (max_new_tokens if by == "constant" else by)))
