"""Settings as frozen values, each of which checks itself and is passed on whole.

Explorers import this file, so it imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group
from lightning_rft.sampling import Sampling

if TYPE_CHECKING:
    from lightning_rft.buffer.selection import Priority, Replay

__all__ = ["Buffer", "Sampling", "Timeouts", "Tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """How many samples may fail, and how far the log-probs of explorers and trainer may differ.

    Args:
        retries: Further attempts at a sample whose reward or workflow raised.
        min_samples: A group with fewer successful samples has failed, and another task takes its place; left out, half
            of ``samples_per_task``, and at least 2 where advantages are relative to the group.
        max_error_rate: Share of the samples of the last two batches that may fail, above 0 and at most 1; more end the
            run with the first error.
        push_gap: Maximum mean difference between explorers' and the trainer's log-probs, in nats, after a push and on
            tokens sampled with the weights that are trained; left out, what rounding in both dtypes explains. The
            metrics ``rft/push_gap`` and ``rft/sampling_gap`` show it.

    Raises:
        ConfigurationError: A setting is out of range.

    Example::

        data = RFTDataModule(tasks=tasks, reward=reward, tolerance=Tolerance(retries=5, max_error_rate=0.5))
    """

    retries: int = 2
    min_samples: int | None = None
    max_error_rate: float = 0.3
    push_gap: float | None = None

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ConfigurationError(f"retries={self.retries} must be at least 0")
        if self.min_samples is not None and self.min_samples < 1:
            raise ConfigurationError(f"min_samples={self.min_samples} must be at least 1")
        if not 0 < self.max_error_rate <= 1:
            raise ConfigurationError(f"max_error_rate={self.max_error_rate} must be above 0 and at most 1")
        if self.push_gap is not None and not self.push_gap > 0:
            raise ConfigurationError(f"push_gap={self.push_gap} must be above 0")

    def needed(self, samples_per_task: int, needs_group: bool) -> int:
        """How many samples of a group must succeed; ``needs_group`` says that advantages are relative to the group."""
        if self.min_samples is not None:
            return self.min_samples
        return min(samples_per_task, max(2 if needs_group else 1, -(-samples_per_task // 2)))


@dataclass(frozen=True)
class Timeouts:
    """How long the work of an explorer may take, in seconds.

    An answer takes as long as its tokens do: only what makes no progress is ended.

    Args:
        reward_s: For one reward, from its turn on.
        sample_s: For the workflow of one sample, from the moment when the engine has room for it; the reward's time is
            not included. Then the answers that are being sampled end, with finish reason ``"length"``, and the sample
            with the last of them. Left out, no limit.
        start_s: Until an engine is ready.
        progress_s: Without progress (no engine step, though there are requests, or no sign of life); an explorer that
            has work and makes none for this long is killed and restarted.
        workflow_s: For the workflow of a sample between two calls of the policy, before the first and after the last.
        sleep_s: Until an explorer that shares the trainer's GPUs sleeps, or is awake again; one that takes longer is
            killed and restarted.

    Raises:
        ConfigurationError: One is not above 0.

    Example::

        data = RFTDataModule(tasks=tasks, reward=reward, timeouts=Timeouts(reward_s=5.0))
    """

    reward_s: float = 60.0
    sample_s: float | None = None
    start_s: float = 600.0
    progress_s: float = 600.0
    workflow_s: float = 600.0
    sleep_s: float = 120.0

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            if not (seconds is None and field.default is None) and not seconds > 0:
                raise ConfigurationError(f"Timeouts({field.name}={seconds}) must be above 0")


@dataclass(frozen=True)
class Buffer:
    """Where experience is kept, and which groups are trained.

    Args:
        path: File of the buffer, or ``":memory:"``; left out, ``rft/buffer.sqlite`` in the trainer's log folder, or
            the same file as before when a run is resumed.
        capacity: Maximum groups explored ahead of training; left out, what the strategy admits.
        selection: Which groups are trained first under an asynchronous strategy; left out, the oldest.
        replay: How often groups are trained; left out, once.
        group_filter: Called as ``group_filter(group)``, once for every complete group; if it returns false, the next
            task takes the place of the group's. It runs in the trainer's process and should be quick.
            :func:`~lightning_rft.has_signal` is one.
        max_refused: Maximum samples in groups that ``group_filter`` refuses in a row; more end the run, which might
            otherwise explore for ever. The metric ``rft/filtered_share`` shows the share that it refuses.
        shuffle: Whether to shuffle stored experience in every epoch, with ``explorers=0``.
        keep: How many batches stay in the file once they are trained, at least 1; older ones are deleted, and their
            space is used again. Left out, all of them stay: reports and ``explorers=0`` have only what is kept. Keep
            more than are trained between two checkpoints: a run that resumes from further back than it keeps explores
            again all that was not trained by then.

    Raises:
        ConfigurationError: A setting cannot work.

    Example::

        data = RFTDataModule(tasks=tasks, reward=reward, buffer=Buffer(group_filter=has_signal, capacity=32))
    """

    path: str | Path | None = None
    capacity: int | None = None
    selection: Priority | None = None
    replay: Replay | None = None
    group_filter: Callable[[Group], object] | None = None
    max_refused: int = 4096
    shuffle: bool = True
    keep: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.path, str) and self.path.startswith("{"):  # what a parser makes of settings it cannot read
            raise ConfigurationError(f"buffer={self.path!r} is no path, and has a setting that Buffer does not take")
        if self.capacity is not None and self.capacity < 1:
            raise ConfigurationError(f"Buffer(capacity={self.capacity}) must be at least 1")
        if self.max_refused < 1:
            raise ConfigurationError(f"Buffer(max_refused={self.max_refused}) must be at least 1")
        if self.keep is not None and self.keep < 1:
            raise ConfigurationError(f"Buffer(keep={self.keep}) must be at least 1: it counts batches")
        if self.group_filter is not None and not callable(self.group_filter):
            raise ConfigurationError(
                f"group_filter is {self.group_filter!r}, which cannot be called: give a function "
                "`group_filter(group) -> bool`"
            )
