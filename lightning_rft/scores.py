"""What a sample earned: the values that rewards and workflows read and return, and their checks."""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Turn, check_names

__all__ = ["Answer", "Sample", "Score", "as_reward", "as_score", "finite"]

_GIVE = ": give a finite number"


@dataclass(frozen=True)
class Sample:
    """What the policy sampled, for a reward with a parameter ``sample``.

    Args:
        turns: Calls of the policy in order, with the ids that each read and sampled.
        raw_texts: Answer of each turn as text, special tokens included.
        messages: Chat messages of the last conversation, its answer included; None if it had none.

    Example::

        def reward(completion, task, sample):
            return float("</think>" in sample.raw_texts[-1] and sample.turns[-1].finish_reason == "stop")
    """

    turns: tuple[Turn, ...]
    raw_texts: tuple[str, ...]
    messages: Sequence[Mapping[str, Any]] | None = None


class Score(NamedTuple):
    """A reward and its parts, which a reward function may return in place of a number.

    Args:
        reward: What is trained. Finite.
        parts: What it is made of, by name, logged as ``rft/reward_<name>``. Finite.

    Example:
        >>> Score(1.5, {"right": 1.0, "form": 0.5}).reward
        1.5
    """

    reward: float
    parts: Mapping[str, float] = {}


@dataclass(frozen=True)
class Answer:
    """What a workflow may return in place of a text: also what the sample earned, or was measured on the way.

    Args:
        text: The answer.
        reward: The reward, if the workflow knows it; the data module's reward is then not asked.
        rewards: Parts of the reward, by name, logged as ``rft/reward_<name>``. Without ``reward`` it is their sum.
        metrics: Other numbers, by name, logged as ``rft/workflow_<name>``.

    Raises:
        ConfigurationError: The text is none, a number is not finite, or a name has other characters than letters,
            digits and ``_.-``, or more than 64.

    Example::

        async def workflow(task, policy):
            game = Game(task.metadata["seed"])
            while not game.over:
                game.move(await policy(game.shown()))
            return Answer(game.shown(), reward=game.won, metrics={"moves": game.moves})
    """

    text: str
    reward: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict, hash=False)
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ConfigurationError(f"Answer(text=...) is a {type(self.text).__name__}: give the text of the answer")
        if self.reward is not None:
            object.__setattr__(self, "reward", finite(self.reward, "Answer(reward=...) is", _GIVE))
        for name, of in {"rewards": "a part of the reward", "metrics": "a metric"}.items():
            given = getattr(self, name)
            if not isinstance(given, Mapping):
                raise ConfigurationError(f"Answer({name}=...) is a {type(given).__name__}: give numbers by name")
            check_names(of, given)
            numbers = {key: finite(value, f"Answer({name}=...)[{key!r}] is", _GIVE) for key, value in given.items()}
            object.__setattr__(self, name, numbers)

    @property
    def score(self) -> Score | None:
        """What the sample earned, if the workflow says so."""
        if self.reward is None and not self.rewards:
            return None
        return as_score(self.rewards if self.reward is None else Score(self.reward, self.rewards))


def as_reward(value: object, task_id: str = "", what: str = "reward") -> float:
    """What a reward function returned for a task, as a float that is finite in float32, in which it is trained.

    Raises :class:`ConfigurationError` unless it is a number: int, float, bool, or a scalar of an array library.

    Example:
        >>> as_reward(True)
        1.0
    """
    return finite(value, f"{what} returned", f" for task {task_id!r}: return a finite float")


def as_score(value: object, task_id: str = "", what: str = "reward") -> Score:
    """What a reward function returned for a task: a number, a mapping of parts, whose sum it is, or a score.

    Raises :class:`ConfigurationError` if it is none of these, or a number in it is not finite.

    Example:
        >>> as_score({"right": 1, "form": 0.5})
        Score(reward=1.5, parts={'right': 1.0, 'form': 0.5})
    """
    given = value.parts if isinstance(value, Score) else value
    if not isinstance(given, Mapping):
        return Score(as_reward(value, task_id, what))
    if not given and not isinstance(value, Score):
        raise ConfigurationError(f"{what} returned no part for task {task_id!r}: return a number, or at least one part")
    check_names("a part of the reward", given)
    parts = {name: as_reward(part, task_id, f"part {name!r} of the {what}") for name, part in given.items()}
    reward = value.reward if isinstance(value, Score) else sum(parts.values())
    return Score(as_reward(reward, task_id, what), parts)


def finite(value: object, begin: str, end: str) -> float:
    """A number as a float that is finite in float32; ConfigurationError, in the caller's words, for anything else."""
    # Numbers of every library have __float__, but so has numpy's string; of arrays only shape () is a scalar.
    if hasattr(value, "__float__") and not isinstance(value, str | bytes) and getattr(value, "shape", ()) == ():
        try:
            number = float(value)
            struct.pack("<f", number)  # raises where it would become infinite
        except Exception as error:  # any class may have a __float__
            raise ConfigurationError(f"{begin} {_shown(value)}{end}") from error
        if math.isfinite(number):
            return number
    raise ConfigurationError(f"{begin} {_shown(value)}{end}")


def _shown(value: object) -> str:
    try:
        shown = reprlib.repr(value)
    except Exception as error:  # any class may have a __repr__
        shown = f"what has no repr ({type(error).__name__})"
    return f"{shown} ({type(value).__name__})"
