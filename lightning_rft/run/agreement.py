"""Proof that a push arrived: explorers and trainer score the same, as far as their dtypes allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

import torch

from lightning_rft.errors import AgreementError
from lightning_rft.trainer.scoring import Scores

__all__ = ["Agreement", "explained", "is_base"]

_KEPT = 8  # versions; explorers load the newest, or one that was the newest when they began
_ROUNDING = 6.0  # two to three times what bfloat16 and float16 were seen to differ by between two implementations
_FLOAT32 = 2e-5  # ten times what float32 was
_SAMPLED = 3.0  # sampled tokens are fewer and less even than a text's
_DOUBT = 4.0  # standard errors
_NOISE = 1e-6  # nats; at least, between two implementations in float32


class Agreement:
    """Compares what explorers score with what the trainer does. Not thread-safe.

    Args:
        largest: Mean difference of log-probs, in nats, that ends the run; ``None`` for what both dtypes explain.
        engine_dtype: Returns the dtype that explorers compute in.
    """

    def __init__(self, largest: float | None, engine_dtype: Callable[[], str]) -> None:
        self._largest = largest
        self._engine_dtype = engine_dtype
        self._expected: dict[int, Scores] = {}
        self._early: dict[int, list[tuple[int, Sequence[float]]]] = {}  # explorers that were faster than the trainer
        self._gap: float | None = None  # the largest since the last metrics
        self._computes = False  # whether any explorer does, or all only simulate

    def expect(self, version: int, scores: Scores) -> None:
        """Takes in how the trainer scores the text with a version that is being pushed.

        Raises:
            AgreementError: An explorer has scored it otherwise.
        """
        self._expected[version] = scores
        for old in sorted(self._expected)[:-_KEPT]:
            del self._expected[old]
        for explorer, logprobs in self._early.pop(version, ()):
            self._compare(explorer, version, logprobs, scores)

    def scored(self, explorer: int, version: int, logprobs: Sequence[float]) -> None:
        """Takes in how an explorer scores the text, or its beginning; an engine that computes nothing sends nothing.

        Raises:
            AgreementError: It computes something else than the trainer, or the base model of its adapter.
        """
        if not logprobs:
            return
        if version in self._expected:
            self._compare(explorer, version, logprobs, self._expected[version])
        elif version > max(self._expected, default=-1):
            self._early.setdefault(version, []).append((explorer, logprobs))

    def _compare(self, explorer: int, version: int, logprobs: Sequence[float], scores: Scores) -> None:
        self._computes = True
        gap = fmean(abs(ours - theirs) for ours, theirs in zip(scores.logprobs, logprobs, strict=False))
        self._gap = max(gap, self._gap or 0.0)
        largest = self._tolerated(scores)
        if scores.pushed_and_base is not None and is_base(logprobs, *scores.pushed_and_base):
            raise AgreementError(
                f"explorer {explorer} computes the base model, without the adapter, after the push of version "
                f"{version}: the weights did not arrive, since with the adapter log-probs differ by more than rounding "
                "explains. Try another transport of the sync strategy, TransformersEngine, or newer packages"
            )
        if not gap <= largest:
            raise AgreementError(
                f"explorer {explorer} computes something else than the trainer after the push of version {version}: "
                f"{self._differ(gap, largest, scores)}"
            )

    def sampled(self, batch: int, gap: float) -> None:
        """Takes in the mean difference, at temperature 1, between on-policy tokens' sampling and training log-probs.

        Raises:
            AgreementError: It is more than the dtypes explain.
        """
        if not self._computes:
            return
        scores = self._expected[max(self._expected)]
        largest = self._tolerated(scores) * _SAMPLED
        if not gap <= largest:
            raise AgreementError(
                f"the tokens of batch {batch} were sampled with the weights that are trained, but "
                f"{self._differ(gap, largest, scores)}"
            )

    def metrics(self) -> dict[str, float]:
        """The largest difference since the last call, if anything was loaded."""
        gap, self._gap = self._gap, None
        return {} if gap is None else {"rft/push_gap": gap}

    def _tolerated(self, scores: Scores) -> float:
        return explained(scores.spread, scores.dtype, self._engine_dtype()) if self._largest is None else self._largest

    def _differ(self, gap: float, largest: float, scores: Scores) -> str:
        return (
            f"log-probs differ by {gap:.2g} nats on average, where up to {largest:.2g} is tolerated (trainer in "
            f"{scores.dtype}, engine in {self._engine_dtype()}). Either weights were left out or loaded in a wrong "
            "place, or one side computes this model otherwise (attention, soft caps, rotary scaling, quantization, "
            "dropout in training): try TransformersEngine, float32 on both sides, or newer packages; if the difference "
            "is known and meant, set Tolerance(push_gap=...)"
        )


def explained(spread: float, *dtypes: str) -> float:
    """The mean difference of log-probs, in nats, that rounding in these dtypes explains.

    Args:
        spread: Standard deviation of the logits over the vocabulary.
        dtypes: Those of both sides, such as ``"bfloat16"``.

    Example:
        >>> f"{explained(3.0, 'float32', 'bfloat16'):.3f}, {explained(3.0, 'float32', 'float32'):.0e}"
        '0.141, 6e-05'
    """
    coarsest = max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)
    return max(_ROUNDING * coarsest * spread, _FLOAT32 * max(1.0, spread))


def is_base(scored: Sequence[float], pushed: Sequence[float], base: Sequence[float]) -> bool:
    """Whether log-probs are the base model's, beyond doubt, and not those with the adapter that was pushed.

    Fits ``scored - base = share * (pushed - base)``: the share is 1 if the adapter arrived and 0 if it did not, give or
    take the standard error that follows from what the fit leaves, the rounding of engine and trainer. It is the base
    model if the share is below a half by four standard errors. An adapter that changes log-probs by less than rounding
    does, or not at all once it is added to weights in the engine's dtype, decides nothing.

    Example:
        >>> is_base([-1.001, -2.0], [-1.1, -1.8], [-1.0, -2.0]), is_base([-1.101, -1.8], [-1.1, -1.8], [-1.0, -2.0])
        (True, False)
    """
    there = len(scored)
    effect = torch.tensor(pushed[:there], dtype=torch.float64) - torch.tensor(base[:there], dtype=torch.float64)
    moved = torch.tensor(scored, dtype=torch.float64) - torch.tensor(base[:there], dtype=torch.float64)
    size = float(effect.norm())
    if size == 0 or there < 2:
        return False
    share = float(moved @ effect) / size**2
    noise = max(float((moved - share * effect).norm()) / math.sqrt(there - 1), _NOISE)
    doubt = _DOUBT * noise / size
    return doubt < 0.5 and share < 0.5 - doubt
