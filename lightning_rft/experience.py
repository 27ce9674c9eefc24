"""The values on every arrow of the picture: tasks go out, experiences come back, a group at a time.

All are frozen and hold plain Python values and bytes, so they cross processes and the buffer unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_rft.errors import ConfigurationError
from lightning_rft.turn import Support, Truncation, Turn

__all__ = [
    "Experience",
    "Group",
    "GroupKey",
    "Progress",
    "Support",
    "Task",
    "TensorInfo",
    "Truncation",
    "Turn",
    "check_names",
]

_NAME = re.compile(r"(?!std\Z)[A-Za-z0-9_.-]{1,64}")  # rft/reward_std is the standard deviation of the whole


@dataclass(frozen=True)
class Task:
    """A question, and what a reward needs to judge the answer.

    Args:
        prompt: Plain text, or chat messages (``[{"role": "user", "content": "..."}]``) to which the tokenizer's
            chat template is applied.
        answer: What the reward compares with; the model never sees it.
        id: Unique among the tasks of a run. Left empty, the position in the task list is taken.
        metadata: Anything else that the reward or the workflow needs.

    Example:
        >>> Task("2 + 2 =", answer="4").answer
        '4'
    """

    prompt: str | Sequence[Mapping[str, Any]]
    answer: Any = None
    id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


class GroupKey(NamedTuple):
    """A group's place in the schedule: the ``slot``-th group of batch ``batch``."""

    batch: int
    slot: int


@dataclass(frozen=True)
class Experience:
    """One scored sample: the turns that a workflow took with the policy, and the reward they earned.

    Args:
        task_id: :attr:`Task.id` of the task that was answered.
        sample: Index of this sample in its group.
        turns: Calls of the policy in order; a single-turn workflow makes one. Their parents make them a tree.
        reward: The score and the rewards of its turns, in sum. Finite.
        text: The last turn decoded, as the reward saw it.
        generate_seconds: Wall-clock seconds from the first call of the policy to the end of the last.
        reward_seconds: Wall-clock seconds that scoring took.
        rewards: Parts of the reward by name. Finite. They are logged as ``rft/reward_<name>``, in names of up to 64
            letters, digits and ``_.-``.
        metrics: What the workflow measured, by names of the same kind. Finite. Logged as ``rft/workflow_<name>``.

    Raises:
        ConfigurationError: A turn's prompt does not go on from its parent's prompt and answer, token for token, or a
            part of the reward or a metric has a name that loggers would refuse or that is taken (``std``).
    """

    task_id: str
    sample: int
    turns: tuple[Turn, ...]
    reward: float
    text: str = ""
    generate_seconds: float = 0.0
    reward_seconds: float = 0.0
    rewards: Mapping[str, float] = field(default_factory=dict, hash=False)
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_names("a part of the reward", self.rewards)
        check_names("a metric", self.metrics)
        for index, turn in enumerate(self.turns):
            if turn.parent is None:
                continue
            if not 0 <= turn.parent < index:
                raise ConfigurationError(f"turn {index} has parent {turn.parent}, which is not an earlier turn")
            parent = self.turns[turn.parent]
            if not turn._prompt_ids.startswith(parent._prompt_ids + parent._token_ids):
                raise ConfigurationError(
                    f"turn {index} does not go on from the tokens of its parent, turn {turn.parent}: leave parent out"
                )

    @property
    def num_tokens(self) -> int:
        """Sampled tokens over all turns."""
        return sum(turn.num_tokens for turn in self.turns)

    @property
    def oldest_version(self) -> int:
        """The oldest version that sampled any token."""
        return min(version for turn in self.turns for version, _ in turn.version_runs)

    @property
    def newest_version(self) -> int:
        """The newest version that sampled any token."""
        return max(version for turn in self.turns for version, _ in turn.version_runs)


def check_names(of: str, names: Iterable[object]) -> None:
    """Raises :class:`ConfigurationError` for a name that not every logger takes, or that is taken."""
    for name in names:
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ConfigurationError(
                f"{of} is named {name!r}: use letters, digits and _.- only, at most 64, and not std"
            )


@dataclass(frozen=True)
class Group:
    """All samples of one task: the unit of the buffer, because advantages are relative to the group."""

    key: GroupKey
    task_id: str
    experiences: tuple[Experience, ...]

    @property
    def num_tokens(self) -> int:
        """Sampled tokens over all samples."""
        return sum(experience.num_tokens for experience in self.experiences)

    @property
    def oldest_version(self) -> int:
        """The oldest version that sampled any token."""
        return min(experience.oldest_version for experience in self.experiences)

    @property
    def newest_version(self) -> int:
        """The newest version that sampled any token."""
        return max(experience.newest_version for experience in self.experiences)

    def is_fresh(self, batch: int, max_staleness: int) -> bool:
        """Whether every token is 0 to ``max_staleness`` batches older than ``batch``."""
        return self.newest_version <= batch <= self.oldest_version + max_staleness


@dataclass(frozen=True)
class Progress:
    """Which groups are part of the weights: all of the batches before ``version`` but ``behind``, and also ``ahead``.

    Asynchronous strategies train groups out of order, so a few of earlier batches may be left and a few of later ones
    be done; in the others both are empty.
    """

    version: int
    behind: frozenset[GroupKey] = frozenset()
    ahead: frozenset[GroupKey] = frozenset()

    def trained(self, key: GroupKey) -> bool:
        """Whether a group is part of the weights."""
        return key in self.ahead or (key.batch < self.version and key not in self.behind)


class TensorInfo(NamedTuple):
    """A tensor of the weights: its ``state_dict`` name, dtype (``"float32"``) and shape.

    ``same_as`` names an earlier tensor of the manifest that is the same memory, as tied weights are: it is delivered
    under both names and need not travel twice.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    same_as: str | None = None
