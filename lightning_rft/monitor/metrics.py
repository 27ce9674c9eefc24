"""The logged metrics of a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric

from lightning_rft.experience import Experience, Group
from lightning_rft.monitor.scores import Scored, score_metrics

__all__ = ["BatchMetrics"]

_NOTHING: dict[type[Metric], tuple[float, ...]] = {MeanMetric: (0.0, 0.0), SumMetric: (0.0,)}


class BatchMetrics(nn.Module):
    """Metrics of one batch, under ``rft/``.

    On several ranks the first has the groups, and each adds its share of what is computed; all get the values of the
    batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = SumMetric()
        self.entropy = MeanMetric()
        self.sampling_gap = MeanMetric()
        self.trained_tokens = SumMetric()
        self._of_groups: dict[str, float] = {}
        self._tokens = 0
        self._began: float | None = None
        self.clear()

    def update_groups(
        self,
        groups: Sequence[Group],
        version: int,
        agree: Callable[[str, Callable[[], Any]], Any] = lambda what, function: function(),
    ) -> None:
        """Sets the groups of the batch, which is trained as ``version``.

        Of several ranks the first has them; ``agree`` names a function that it calls, and all get the result.
        """

        def measured() -> tuple[dict[str, float], int]:
            of_groups = score_metrics([list(map(_scored, group.experiences)) for group in groups])
            return of_groups | _token_metrics(groups, version), sum(group.num_tokens for group in groups)

        self._of_groups, self._tokens = agree("the metrics of a batch", measured)

    def update_loss(self, loss: Tensor) -> None:
        """Adds a part of the batch's loss."""
        # the metric would leave NaN out of its sum
        self.loss.update(loss.detach().nan_to_num(math.inf, math.inf, -math.inf))

    def update_tokens(self, entropy: Tensor, statistics: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Adds what the training step computed, one value per trained token [N]; a ``weight`` of 0 leaves them out."""
        self.trained_tokens.update(entropy.numel() * weight)
        self.entropy.update(entropy, weight)
        for name, values in statistics.items():
            if name not in self._modules:
                self.add_module(name, MeanMetric().to(values.device))
            # the step checks what is not finite
            self.get_submodule(name).update(values.nan_to_num(0.0, 0.0, 0.0), weight * values.isfinite())  # type: ignore[operator]

    def update_gap(self, gap: Tensor, on_policy: Tensor) -> None:
        """Adds the difference of each token's log-prob from the one it was sampled with [N], where ``on_policy``."""
        self.sampling_gap.update(gap.nan_to_num(0.0, 0.0), on_policy.float())

    def collect(self) -> dict[str, float]:
        """Returns the values of the batch, and starts the next."""
        now = time.perf_counter()
        # in the same order on every rank, since each of these is a collective
        values = {name: float(metric.compute()) for name, metric in self._metrics()}
        trained = values.pop("trained_tokens")
        if not trained:
            values = {"loss": values["loss"]}
        if math.isnan(values.get("sampling_gap", 0.0)):  # no token was sampled with the weights that are trained
            del values["sampling_gap"]
        values = {f"rft/{name}": value for name, value in values.items()} | self._of_groups
        if self._tokens:
            values["rft/trained_share"] = trained / self._tokens
        if self._began is not None:
            values["rft/tokens_per_second"] = self._tokens / (now - self._began)
        self.restart(now)
        return values

    def restart(self, now: float | None = None) -> None:
        """Forgets what was added; the clock starts now."""
        self._began = time.perf_counter() if now is None else now
        self.clear()

    def clear(self) -> None:
        """Forgets what was added."""
        self._of_groups, self._tokens = {}, 0
        for _, metric in self._metrics():
            metric.reset()
            # so that a rank with an empty share has something to add to
            metric.update(*_NOTHING[type(metric)])

    def _metrics(self) -> list[tuple[str, Metric]]:
        return [(name, child) for name, child in self.named_children() if isinstance(child, Metric)]


def _scored(experience: Experience) -> Scored:
    finish_reason = experience.turns[-1].finish_reason if experience.turns else ""
    return Scored(experience.reward, experience.rewards, experience.num_tokens, finish_reason, experience.metrics)


def _token_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """How stale the tokens of a batch are, and how uncertain the policy was that sampled them."""
    turns = [turn for group in groups for experience in group.experiences for turn in experience.turns]
    runs = [run for turn in turns for run in turn.version_runs]
    tokens = sum(count for _, count in runs)
    if not tokens:
        return {}
    logprob = sum(float(turn.logprobs.sum(dtype=np.float64)) for turn in turns)
    return {
        "rft/sampling_entropy": -logprob / tokens,
        "rft/staleness_mean": version - sum(sampled * count for sampled, count in runs) / tokens,
        "rft/staleness_max": float(version - min(sampled for sampled, _ in runs)),
    }
