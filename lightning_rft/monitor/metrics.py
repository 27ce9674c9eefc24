"""The logged metrics of a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, Metric, SumMetric

from lightning_rft.experience import Group

__all__ = ["BatchMetrics"]

_OF_ALL_GROUPS = {"loss", "reward", "reward_std", "completion_length", "staleness_mean", "staleness_max"}
_NOTHING: dict[type[Metric], tuple[float, ...]] = {MeanMetric: (0.0, 0.0), SumMetric: (0.0,), MaxMetric: (-math.inf,)}


class BatchMetrics(nn.Module):
    """Metrics of one batch, under ``rft/``; on several ranks each adds its share, and all get those of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = SumMetric()
        self.reward = MeanMetric()
        self.reward_std = MeanMetric()
        self.completion_length = MeanMetric()
        self.staleness_mean = MeanMetric()
        self.staleness_max = MaxMetric()
        self.entropy = MeanMetric()
        self.sampling_gap = MeanMetric()
        self.tokens = SumMetric()
        self.trained_tokens = SumMetric()
        self._began: float | None = None
        self.clear()

    def update_groups(self, groups: Sequence[Group], version: int) -> None:
        """Adds the groups of a micro-batch, trained as ``version``."""
        for group in groups:
            rewards = torch.tensor([experience.reward for experience in group.experiences], dtype=torch.float64)
            self.reward.update(rewards.float())
            self.reward_std.update(rewards.std().float() if len(rewards) > 1 else 0.0)
            self.completion_length.update(
                torch.tensor([experience.num_tokens for experience in group.experiences], dtype=torch.float32)
            )
            versions = [turn.versions for experience in group.experiences for turn in experience.turns]
            staleness = version - torch.from_numpy(np.concatenate(versions)).float()
            self.staleness_mean.update(staleness)
            self.staleness_max.update(staleness)
            self.tokens.update(float(len(staleness)))

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
        tokens = values.pop("tokens")
        if not values.pop("trained_tokens"):
            values = {name: value for name, value in values.items() if name in _OF_ALL_GROUPS}
        if math.isnan(values.get("sampling_gap", 0.0)):  # no token was sampled with the weights that are trained
            del values["sampling_gap"]
        values = {f"rft/{name}": value for name, value in values.items()}
        if self._began is not None:
            values["rft/tokens_per_second"] = tokens / (now - self._began)
        self.restart(now)
        return values

    def restart(self, now: float | None = None) -> None:
        """Forgets what was added; the clock starts now."""
        self._began = time.perf_counter() if now is None else now
        self.clear()

    def clear(self) -> None:
        """Forgets what was added."""
        for _, metric in self._metrics():
            metric.reset()
            # so that a rank with an empty share has something to add to
            metric.update(*_NOTHING[type(metric)])

    def _metrics(self) -> list[tuple[str, Metric]]:
        return [(name, child) for name, child in self.named_children() if isinstance(child, Metric)]
