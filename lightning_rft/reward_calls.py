"""How reward functions are called: for one sample or a whole group, plain or ``async``, alone or as parts of a sum."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task, check_names
from lightning_rft.scores import Sample, Score, as_score, finite

__all__ = ["Answered", "RewardFunction", "RewardSum", "check_reward", "reward_of", "total"]

_EXPECTED = (
    "give a function `reward(completion: str, task: Task) -> float`, or `reward(completions, tasks) -> list[float]` "
    "for all samples of a task"
)


class Answered(NamedTuple):
    """A sample that is to be scored."""

    completion: str
    task: Task
    sample: Sample | None = None


@dataclass(frozen=True)
class RewardFunction:
    """A user's reward function and what its signature says."""

    function: Callable[..., Any]
    is_async: bool
    #: Whether it scores all samples of a group together.
    batched: bool
    wants_sample: bool
    #: What errors call it.
    what: str = "reward"

    @classmethod
    def of(cls, function: Callable[..., Any], what: str = "reward") -> RewardFunction:
        """Looks at a function, an object or a method that can be called."""
        signature = _signature(function)
        names = [] if signature is None else list(signature.parameters)
        batched = names[:2] == ["completions", "tasks"]
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        return cls(function, is_async, batched, ("samples" if batched else "sample") in names[2:], what)

    def scores(self, answered: Sequence[Answered]) -> list[Score]:
        """Scores of samples by a plain function."""
        return self._checked(self._ask(answered), answered)

    async def awaited_scores(self, answered: Sequence[Answered]) -> list[Score]:
        """Scores of samples by an ``async`` function."""
        return self._checked(await self._ask(answered), answered)

    def half(self, is_async: bool) -> RewardFunction | None:
        """The part of it that is ``async``, or that is not."""
        return self if self.is_async == is_async else None

    def _ask(self, answered: Sequence[Answered]) -> Any:
        """What the function returns for each sample; of an ``async`` one, what to await for that."""
        if self.batched:
            completions, tasks, samples = map(list, zip(*answered, strict=True))
            return self.function(completions, tasks, **({"samples": samples} if self.wants_sample else {}))
        returned = [
            self.function(completion, task, **({"sample": sample} if self.wants_sample else {}))
            for completion, task, sample in answered
        ]
        return _together(returned) if self.is_async else returned

    def _checked(self, returned: Any, answered: Sequence[Answered]) -> list[Score]:
        task_id = answered[0].task.id
        try:
            count = None if isinstance(returned, Mapping) else len(returned)
        except TypeError:  # also of an array without a dimension
            count = None
        if count != len(answered):
            found = f"a {type(returned).__name__}" if count is None else f"{count} rewards"
            raise ConfigurationError(
                f"{self.what} returned {found} for {len(answered)} completions of task {task_id!r}: return a list with "
                "the reward of each"
            )
        return [as_score(value, task_id, self.what) for value in returned]


class RewardSum:
    """Adds rewards, and logs each by its name.

    The parts are called as if each were the reward: plain or ``async``, with or without ``sample``, of one completion
    or of all. Those that are ``async`` run at the same time, after the others, and make the sum ``async``.

    Args:
        parts: Reward functions by name, logged as ``rft/reward_<name>`` without their weights. What itself has parts,
            as a sum in a sum, is also logged as ``rft/reward_<name>.<part>``.
        weights: What each is multiplied by in the sum; left out, 1. A part of weight 0 is only logged.

    Raises:
        ConfigurationError: There is no part, a part cannot be called as a reward, a weight is not finite or of no part,
            or a name has other characters than letters, digits and ``_.-``, or more than 64.

    Example:
        >>> def right(completion, task): return float(completion == task.answer)
        >>> def short(completion, task): return 1 / (1 + len(completion))
        >>> reward = RewardSum({"right": right, "short": short}, weights={"short": 0.5})
        >>> reward("4", Task("2 + 2 =", answer="4"))
        Score(reward=1.25, parts={'right': 1.0, 'short': 0.5})
    """

    def __init__(self, parts: Mapping[str, Callable[..., Any]], weights: Mapping[str, float] | None = None) -> None:
        if not parts:
            raise ConfigurationError("RewardSum(parts={}) has nothing to add: give reward functions by name")
        check_names("a part of the reward", parts)
        if unknown := [name for name in weights or {} if name not in parts]:
            raise ConfigurationError(f"RewardSum(weights=...) has {unknown[0]!r}, which is no part: {', '.join(parts)}")
        for part in parts.values():
            check_reward(part)
        self.parts = dict(parts)
        self.weights = {name: 1.0 for name in parts} | {
            name: finite(weight, f"RewardSum(weights=...)[{name!r}] is", ": give a finite number")
            for name, weight in (weights or {}).items()
        }
        self._functions = {name: reward_of(part, f"part {name!r} of the reward") for name, part in parts.items()}
        self.is_async: bool = any(part.is_async for part in self._functions.values())
        self.batched: bool = any(part.batched for part in self._functions.values())
        self.wants_sample: bool = any(part.wants_sample for part in self._functions.values())

    def __call__(self, completion: str, task: Task, sample: Sample | None = None) -> Score | Coroutine[Any, Any, Score]:
        """The score of one completion; to be awaited if a part is ``async``."""
        answered = [Answered(completion, task, sample)]
        return self._awaited_score(answered) if self.is_async else self.scores(answered)[0]

    def scores(self, answered: Sequence[Answered]) -> list[Score]:
        """Scores of samples, if no part is ``async``."""
        return self._added({name: part.scores(answered) for name, part in self._functions.items()}, answered)

    async def awaited_scores(self, answered: Sequence[Answered]) -> list[Score]:
        """Scores of samples, if a part is ``async``."""
        plain = {name: part.scores(answered) for name, part in self._functions.items() if not part.is_async}
        waiting = {name: part.awaited_scores(answered) for name, part in self._functions.items() if part.is_async}
        found = dict(zip(waiting, await _together(waiting.values()), strict=True))
        return self._added({name: (plain | found)[name] for name in self.parts}, answered)

    def half(self, is_async: bool) -> RewardSum | None:
        """The sum of the parts that are ``async``, or that are not; None if there are none."""
        parts = {name: part for name, part in self.parts.items() if self._functions[name].is_async == is_async}
        return RewardSum(parts, {name: self.weights[name] for name in parts}) if parts else None

    async def _awaited_score(self, answered: Sequence[Answered]) -> Score:
        return (await self.awaited_scores(answered))[0]

    def _added(self, scores: Mapping[str, Sequence[Score]], answered: Sequence[Answered]) -> list[Score]:
        sums = []
        for index, one in enumerate(answered):
            parts: dict[str, float] = {}
            for name, of_all in scores.items():
                reward, inner = of_all[index]
                parts |= {name: reward, **{f"{name}.{part}": value for part, value in inner.items()}}
            reward = sum(self.weights[name] * parts[name] for name in scores)
            sums.append(as_score(Score(reward, parts), one.task.id))
        return sums


def reward_of(reward: Callable[..., Any], what: str = "reward") -> RewardFunction | RewardSum:
    """A user's reward as it is called."""
    return reward if isinstance(reward, RewardSum) else RewardFunction.of(reward, what)


def total(one: Score, other: Score) -> Score:
    """The sum of two scores, which name different parts."""
    return as_score(Score(one.reward + other.reward, {**one.parts, **other.parts}))


def check_reward(reward: object) -> None:
    """Raises :class:`ConfigurationError` for a reward function that cannot be called as explorers will call it."""
    if not callable(reward):
        raise ConfigurationError(f"reward is {reward!r}, which cannot be called: {_EXPECTED}")
    signature = _signature(reward)
    if signature is None:  # the first call shows
        return
    asked = reward_of(reward)
    wanted = ("samples" if asked.batched else "sample",) if asked.wants_sample else ()
    try:
        signature.bind(object(), object(), **dict.fromkeys(wanted, object()))
    except TypeError as error:
        raise ConfigurationError(f"reward {reward!r} has the signature {signature} ({error}): {_EXPECTED}") from error


def _signature(reward: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(reward)
    except (TypeError, ValueError):  # some callables written in C have none
        return None


async def _together(waiting: Collection[Coroutine[Any, Any, Any]]) -> list[Any]:
    """What these return; none goes on once one of them has raised."""
    if len(waiting) == 1:  # as most are
        return [await one for one in waiting]
    tasks = [asyncio.ensure_future(_contained(one)) for one in waiting]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _contained(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await work
    except (KeyboardInterrupt, SystemExit) as error:  # with which a task would end the loop
        raise RuntimeError(
            f"a reward raised {type(error).__name__}({str(error)!r}), which no sample may end with"
        ) from error
