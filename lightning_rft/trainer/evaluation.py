"""What validation measures: scores of each task's answers, and their means over the tasks of a set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import takewhile
from math import comb
from statistics import fmean
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience
from lightning_rft.trainer.loader import BatchPart

__all__ = ["Evaluation", "majority", "mean_by_name", "pass_at_k", "sizes", "task_scores"]


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of ``k`` answers passes (Chen et al. 2021, arXiv 2107.03374).

    ``passed`` of ``samples`` answers did, which are at least ``k``.

    Example:
        >>> pass_at_k(4, 1, k=1), pass_at_k(4, 1, k=2)
        (0.25, 0.5)
    """
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def majority(answers: Sequence[Hashable], scores: Sequence[float]) -> float:
    """Expected score of the answer that most samples give, where each of several such answers is as likely.

    Example:
        >>> majority(["4", "4", "5"], [1.0, 1.0, 0.0]), majority(["4", "5"], [1.0, 0.0])
        (1.0, 0.5)
    """
    try:
        votes = Counter(answers)
    except TypeError as error:
        raise ConfigurationError(
            f"RFTModule(final_answer=...) returned a {type(answers[0]).__name__} ({error}): return a string or a number"
        ) from error
    most = max(votes.values())
    # equally many samples stand for each of these answers
    return fmean(score for answer, score in zip(answers, scores, strict=True) if votes[answer] == most)


def sizes(samples: int) -> list[int]:
    """The ``k`` that are measured with so many samples of a task: the powers of two below, and all."""
    return [*takewhile(lambda k: k < samples, (2**power for power in range(samples))), samples]


def task_scores(
    experiences: Sequence[Experience],
    samples: int,
    *,
    pass_threshold: float,
    final_answer: Callable[[str], Hashable],
) -> dict[str, float]:
    """Scores of one task, of whose ``samples`` answers some may have failed.

    What cannot be estimated without bias from fewer answers is left out.
    """
    if not experiences:
        return {}
    count = len(experiences)
    passed = [experience.reward >= pass_threshold for experience in experiences]
    scores = {"reward": fmean(experience.reward for experience in experiences)}
    scores |= {f"pass_at_{k}": pass_at_k(count, sum(passed), k) for k in sizes(samples) if k <= count}
    if 1 < samples == count:
        answers = [final_answer(experience.text) for experience in experiences]
        scores |= {f"avg_at_{samples}": fmean(passed), f"maj_at_{samples}": majority(answers, passed)}
    return scores | {
        "completion_length": fmean(experience.num_tokens for experience in experiences),
        "truncated_share": fmean(experience.turns[-1].finish_reason == "length" for experience in experiences),
        "version": fmean(experience.oldest_version for experience in experiences),
        **mean_by_name({f"reward_{name}": part for name, part in one.rewards.items()} for one in experiences),
        **mean_by_name({f"workflow_{name}": value for name, value in one.metrics.items()} for one in experiences),
    }


def mean_by_name(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every score, over those that have it."""
    named: dict[str, list[float]] = defaultdict(list)
    for one in scores:
        for name, value in one.items():
            named[name].append(value)
    return {name: fmean(values) for name, values in named.items()}


class Evaluation:
    """Collects the scores of one validation.

    Args:
        stage: Begins the names of metrics: ``"val"`` or ``"test"``.
        pass_threshold: As for :func:`task_scores`.
        final_answer: As for :func:`task_scores`.
    """

    def __init__(self, stage: str, pass_threshold: float, final_answer: Callable[[str], Hashable]) -> None:
        self._stage = stage
        self._judge: dict[str, Any] = {"pass_threshold": pass_threshold, "final_answer": final_answer}
        self._all: list[dict[str, float]] = []  # scores of each task
        self._set: list[dict[str, float]] = []  # of the current set

    def add(self, answers: BatchPart) -> dict[str, float]:
        """Takes in answers; returns the metrics of what ends with them: of a set that has a name, and of all."""
        self._set += [task_scores(group.experiences, answers.samples, **self._judge) for group in answers.groups]
        metrics: dict[str, float] = {}
        if answers.last:
            if answers.val_set:
                metrics |= self._metrics(f"{self._stage}/{answers.val_set}", self._set)
            self._all += self._set
            self._set = []
        if answers.ends:
            metrics |= self._metrics(self._stage, self._all)
            if f"{self._stage}/pass_at_1" in metrics:
                metrics[f"{self._stage}/pass@1"] = metrics[f"{self._stage}/pass_at_1"]  # its name before 0.3.0
        return metrics

    @staticmethod
    def _metrics(prefix: str, tasks: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {f"{prefix}/{name}": value for name, value in mean_by_name(tasks).items()}
