"""Settings that belong together, as frozen values: each checks itself, and travels whole to where it is used.

Explorers' processes import this file, so it imports neither torch nor Lightning, nor a part of the loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group

if TYPE_CHECKING:
    from lightning_rft.buffer.selection import Priority, Replay

__all__ = ["Buffer", "Sampling", "Timeouts", "Tolerance"]


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; what is left out, the data module fills in.

    Args:
        max_new_tokens: Maximum tokens per answer; left out, 256 in training, and what training has in validation.
        temperature: Softmax temperature, at least 0, which is greedy; left out, 1 in training and 0 in validation.
        seed: Seeds the order of the tasks and every sample; left out, the one of ``seed_everything``, else 0, and what
            training has in validation.

    Raises:
        ConfigurationError: A setting is out of range.

    Example:
        >>> Sampling(temperature=0.8).filled(Sampling(max_new_tokens=256, temperature=1.0, seed=0))
        Sampling(max_new_tokens=256, temperature=0.8, seed=0)
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature is not None and not self.temperature >= 0:
            raise ConfigurationError(f"temperature={self.temperature} must be at least 0")

    def filled(self, default: Sampling) -> Sampling:
        """Returns these settings, with what is left out taken from ``default``."""
        missing = [field.name for field in fields(self) if getattr(self, field.name) is None]
        return replace(self, **{name: getattr(default, name) for name in missing})

    def for_training(self, max_new_tokens: int | None) -> Sampling:
        """Returns these settings as training takes them, where two arguments may both name ``max_new_tokens``."""
        if max_new_tokens is not None and self.max_new_tokens not in (None, max_new_tokens):
            raise ConfigurationError(
                f"max_new_tokens={max_new_tokens} and sampling=Sampling(max_new_tokens={self.max_new_tokens}): set one"
            )
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        return self.filled(Sampling(256 if max_new_tokens is None else max_new_tokens, 1.0, seed))


@dataclass(frozen=True)
class Tolerance:
    """How many samples may fail before their group has failed, and before the run ends; how far both sides may differ.

    Args:
        retries: How often a sample is tried again when its reward or workflow raised.
        min_samples: A group in which fewer samples succeed has failed, and another task takes its place; left out, half
            of ``samples_per_task``, and at least 2 where advantages are relative to the group.
        max_error_rate: Share of the samples of the last two batches that may fail, above 0 and at most 1; more end the
            run with the first error.
        push_gap: Mean difference between explorers' and the trainer's log-probs, in nats, that is tolerated after a
            push and on tokens that were sampled with the weights that are trained; left out, what the rounding of both
            dtypes explains. ``rft/push_gap`` and ``rft/sampling_gap`` tell what it is.

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
        """Returns how many samples of a group must succeed.

        Args:
            samples_per_task: Samples of a group.
            needs_group: Whether advantages are relative to the group.
        """
        if self.min_samples is not None:
            return self.min_samples
        return min(samples_per_task, max(2 if needs_group else 1, -(-samples_per_task // 2)))


@dataclass(frozen=True)
class Timeouts:
    """How long the work of an explorer may take, in seconds.

    Args:
        reward_s: For one reward, from its turn on.
        sample_s: For the workflow of one sample, from the moment when the engine has room for it; the reward has
            ``reward_s`` besides.
        start_s: Until an engine is ready.
        progress_s: Without progress (no engine step, no reward); an explorer that has work and makes none for so long
            is ended, and another is started.

    Raises:
        ConfigurationError: One is not above 0.

    Example::

        data = RFTDataModule(tasks=tasks, reward=reward, timeouts=Timeouts(reward_s=5.0))
    """

    reward_s: float = 60.0
    sample_s: float = 600.0
    start_s: float = 600.0
    progress_s: float = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigurationError(f"Timeouts({field.name}={getattr(self, field.name)}) must be above 0")


@dataclass(frozen=True)
class Buffer:
    """Where experience is kept, and which groups are trained.

    Args:
        path: File of the buffer, or ``":memory:"``; left out, ``rft/buffer.sqlite`` in the trainer's log folder, or
            when a run is resumed the file that it had.
        capacity: Maximum groups explored ahead of training; left out, what the strategy admits.
        selection: Which groups are trained first under an asynchronous strategy; left out, the oldest.
        replay: Has groups trained more than once; left out, each is trained once.
        group_filter: ``group_filter(group)``, called once for every complete group; where it returns false, the group's
            task has ended and the next one takes its place. :func:`~lightning_rft.has_signal` is one. It runs in the
            trainer's process, while explorers are listened to: it should be quick.
        max_refused: Samples of groups that ``group_filter`` may refuse in a row; more end the run, which might
            otherwise explore for ever. ``rft/filtered_share`` tells how many it refuses.
        shuffle: Whether every epoch over stored experience (``explorers=0``) has an order of its own.

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

    def __post_init__(self) -> None:
        if isinstance(self.path, str) and self.path.startswith("{"):  # what a parser makes of settings it cannot read
            raise ConfigurationError(f"buffer={self.path!r} is no path, and has a setting that Buffer does not take")
        if self.capacity is not None and self.capacity < 1:
            raise ConfigurationError(f"Buffer(capacity={self.capacity}) must be at least 1")
        if self.max_refused < 1:
            raise ConfigurationError(f"Buffer(max_refused={self.max_refused}) must be at least 1")
        if self.group_filter is not None and not callable(self.group_filter):
            raise ConfigurationError(
                f"group_filter is {self.group_filter!r}, which cannot be called: give a function "
                "`group_filter(group) -> bool`"
            )
