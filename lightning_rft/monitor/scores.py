"""The metrics of a batch that follow from the scores and lengths of its samples alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["Scored", "score_metrics"]


class Scored(NamedTuple):
    """A sample without its tokens."""

    reward: float
    #: Parts of the reward by name.
    rewards: Mapping[str, float]
    #: Sampled tokens.
    num_tokens: int
    finish_reason: str
    #: Of the workflow, by name.
    metrics: Mapping[str, float] = MappingProxyType({})


def score_metrics(groups: Sequence[Sequence[Scored]]) -> dict[str, float]:
    """Values by name, of a batch as the groups of its samples; nothing if it has none.

    Example:
        >>> group = [Scored(1.0, {}, 3, "stop"), Scored(0.0, {}, 5, "length")]
        >>> metrics = score_metrics([group])
        >>> metrics["rft/reward"], metrics["rft/completion_length_max"], metrics["rft/truncated_share"]
        (0.5, 5.0, 0.5)
    """
    samples = [sample for group in groups for sample in group]
    if not samples:
        return {}
    rewards = [[sample.reward for sample in group] for group in groups if group]
    lengths = [sample.num_tokens for sample in samples]
    named: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for kind, numbers in {"reward": sample.rewards, "workflow": sample.metrics}.items():
            for name, number in numbers.items():
                named[f"rft/{kind}_{name}"].append(number)
    return {
        "rft/reward": _mean(sample.reward for sample in samples),
        "rft/reward_std": _mean(map(_std, rewards)),
        "rft/group_reward_min": _mean(map(min, rewards)),
        "rft/group_reward_max": _mean(map(max, rewards)),
        "rft/groups_without_signal": _mean(min(group) == max(group) for group in rewards),
        "rft/completion_length": _mean(lengths),
        "rft/completion_length_min": float(min(lengths)),
        "rft/completion_length_max": float(max(lengths)),
        "rft/truncated_share": _mean(sample.finish_reason == "length" for sample in samples),
        **{name: _mean(values) for name, values in sorted(named.items())},
    }


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)  # infinite where it overflows, at which fmean raises


def _std(values: Sequence[float]) -> float:
    if min(values) == max(values):  # also of a single one; rounding would leave a trace
        return 0.0
    mean = _mean(values)
    return sqrt(sum((value - mean) * (value - mean) for value in values) / (len(values) - 1))
