"""Advantages: how much better a sample is than expected."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["Advantage", "BatchRelative", "GroupRelative", "LeaveOneOut", "Raw", "relative"]

_EPS = 1e-4


class Advantage(ABC):
    """Base class of advantages: subclass it as a frozen dataclass whose fields are its settings."""

    #: Whether samples of a task are compared, so that a task with one sample would teach nothing.
    needs_group = True

    @abstractmethod
    def __call__(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Computes the advantage of each sample of a batch.

        Args:
            rewards: Reward of each sample [S], float64, since a reward may be beyond float32.
            groups: Which group each sample belongs to [S], int64, in any order.

        Returns:
            Advantages [S], detached.
        """


@dataclass(frozen=True)
class GroupRelative(Advantage):
    """The reward minus the mean of its group: GRPO, `Shao et al. 2024 <https://arxiv.org/abs/2402.03300>`_.

    The group stands in for a learned value function. A group whose rewards are all equal, or that has one sample, gets
    exactly zero (and the shift).

    Args:
        scale: What advantages are divided by: the standard deviation of the rewards of the ``"group"`` or of the whole
            ``"batch"`` (`Hu et al. 2025 <https://arxiv.org/abs/2501.03262>`_), plus 1e-4; None for nothing, as in
            `Dr. GRPO <https://arxiv.org/abs/2503.20783>`_.
        shift: Added to each advantage in the end: above 0, what is good counts for more than what is bad.
    """

    scale: Literal["group", "batch"] | None = "group"
    shift: float = 0.0

    @override
    def __call__(self, rewards: Tensor, groups: Tensor) -> Tensor:
        by = {None: None, "group": groups, "batch": torch.zeros_like(groups)}
        return relative(rewards, groups, by[self.scale]) + self.shift


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """The reward minus the mean of the other rewards of its group, which makes it an unbiased baseline.

    RLOO, `Kool et al. 2019 <https://openreview.net/forum?id=r1lgTGL5DE>`_, `Ahmadian et al. 2024
    <https://arxiv.org/abs/2402.14740>`_. A group of one sample gets zero.
    """

    @override
    def __call__(self, rewards: Tensor, groups: Tensor) -> Tensor:
        _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
        size = counts[index].double()
        return (relative(rewards, groups).double() * size / (size - 1).clamp(min=1)).to(rewards.dtype)


@dataclass(frozen=True)
class BatchRelative(Advantage):
    """The reward minus the mean of the batch, divided by the batch's standard deviation.

    REINFORCE++, `Hu et al. 2025 <https://arxiv.org/abs/2501.03262>`_: it needs no groups, and hard and easy tasks count
    alike.
    """

    needs_group = False

    @override
    def __call__(self, rewards: Tensor, groups: Tensor) -> Tensor:
        whole = torch.zeros_like(groups)
        return relative(rewards, whole, whole)


@dataclass(frozen=True)
class Raw(Advantage):
    """The reward itself, minus a constant: REINFORCE, `Williams 1992 <https://doi.org/10.1007/BF00992696>`_.

    Args:
        baseline: The constant.
    """

    baseline: float = 0.0
    needs_group = False

    @override
    def __call__(self, rewards: Tensor, groups: Tensor) -> Tensor:
        return rewards.detach() - self.baseline


def relative(rewards: Tensor, groups: Tensor, scale: Tensor | None = None, eps: float = _EPS) -> Tensor:
    """The reward of each sample [S] minus the mean of its group, given as int64 ids [S] in any order; detached.

    With ``scale``, it is divided by the standard deviation (unbiased) of the group that this gives, plus ``eps``; any
    finite rewards then give finite advantages. Equal rewards give exactly zero. Integer rewards give float32, others
    keep their dtype.

    Example:
        >>> relative(torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]))
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    within = _Groups(rewards, groups)
    values, unit = within.values, within.unit[within.index]
    if scale is None:
        values = values * unit
    else:
        by = _Groups(rewards, scale)
        values = values * (unit / by.unit[by.index]) / (by.deviation + eps / by.unit)[by.index]
    # the mean of equal numbers is not always that number, and dividing by eps would magnify the difference
    values = values.masked_fill(within.flat[within.index], 0.0)
    return values.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


class _Groups:
    """Statistics of groups, in units that differ from group to group: powers of two, which round nothing.

    So neither sums nor squares of rewards overflow or vanish.
    """

    def __init__(self, rewards: Tensor, groups: Tensor) -> None:
        values = rewards.detach().double()
        names, self.index = torch.unique(groups, return_inverse=True)
        zeros = values.new_zeros(len(names))
        largest = zeros.scatter_reduce(0, self.index, values.abs(), "amax", include_self=False)
        self.unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp(-1000, 1000))
        lowest = zeros.scatter_reduce(0, self.index, values, "amin", include_self=False)
        highest = zeros.scatter_reduce(0, self.index, values, "amax", include_self=False)
        self.flat = lowest == highest
        values = values / self.unit[self.index]
        count = zeros.index_add(0, self.index, torch.ones_like(values))
        self.values = values - (zeros.index_add(0, self.index, values) / count)[self.index]
        variance = zeros.index_add(0, self.index, self.values.square()) / (count - 1).clamp(min=1)
        self.deviation = variance.sqrt()
