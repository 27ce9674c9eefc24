"""Advantages: how much better a sample is than expected."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_relative"]


def group_relative(rewards: Tensor, groups: Tensor, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """The reward of each sample [S] relative to its group, given as int64 ids [S] in any order; detached.

    The reward minus the mean of its group, divided by the group's standard deviation (unbiased) plus ``eps`` if
    ``scale``: GRPO, `Shao et al. 2024 <https://arxiv.org/abs/2402.03300>`_. The group stands in for a learned value
    function. A group whose rewards are all equal, or that has one sample, gets exactly zero. Integer rewards give
    float32, others keep their dtype. Any finite rewards give finite advantages with ``scale``.

    Example:
        >>> group_relative(torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]), scale=False)
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    values = rewards.detach().double()
    names, index = torch.unique(groups, return_inverse=True)
    zeros = values.new_zeros(len(names))
    # By a power of two, which rounds nothing, so that neither sums nor squares of rewards overflow or vanish.
    largest = zeros.scatter_reduce(0, index, values.abs(), "amax", include_self=False)
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp(-1000, 1000))
    values = values / unit[index]
    count = zeros.index_add(0, index, torch.ones_like(values))
    mean = zeros.index_add(0, index, values) / count
    advantages = values - mean[index]
    if scale:
        variance = zeros.index_add(0, index, advantages.square()) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + eps / unit)[index]
    else:
        advantages = advantages * unit[index]
    # The mean of equal numbers is not always that number, and dividing by eps would magnify the difference.
    lowest = zeros.scatter_reduce(0, index, values, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, values, "amax", include_self=False)
    return advantages.masked_fill((lowest == highest)[index], 0.0).to(dtype)
