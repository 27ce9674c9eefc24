"""Environments by their shape: what Gymnasium, OpenEnv, TextArena and TRL call and return, without importing them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.explorer.workflows.tool_calls import as_text

__all__ = [
    *("Step", "describe", "first_observation", "is_game", "parameters_of", "reset_arguments", "step_of", "task_seed"),
    "tool_methods",
]

_NO_TOOLS = ("reset", "get_reward", "reward", "close")
_NO_OBSERVATION = ("done", "reward", "metadata")  # fields of an observation that are OpenEnv's own


class Step(NamedTuple):
    """What came of an action."""

    observation: Any
    reward: float
    done: bool


def task_seed(task: Task) -> int:
    """A task's own seed, so that all samples of a group begin in the same state."""
    seed = task.metadata.get("seed")
    return seed if isinstance(seed, int) else int.from_bytes(blake2b(task.id.encode(), digest_size=4).digest()) % 2**31


def is_game(environment: Any) -> bool:
    """Whether it has the shape of TextArena, where a step returns no observation, and the end the reward."""
    return hasattr(environment, "get_observation")


def reset_arguments(reset: Callable[..., Any], task: Task, *, steps: bool) -> dict[str, Any]:
    """What ``reset`` is given of a task: what it has parameters for; with ``**kwargs`` also the task's columns."""
    columns = {**task.metadata, "seed": task_seed(task)}
    if not steps:  # as TRL does, while an OpenEnv client would send them all
        columns |= {"prompt": task.prompt, "answer": task.answer}
    offered = {"task": task, "num_players": 1, "prompt": task.prompt, "answer": task.answer, **columns}
    parameters = parameters_of(reset).values()
    named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    if any(one.kind == one.VAR_KEYWORD for one in parameters):
        named |= columns.keys()
    return {name: value for name, value in offered.items() if name in named}


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Parameters by name; none of what is written in C and does not tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def first_observation(returned: Any) -> Any:
    """The observation in what ``reset`` returned: Gymnasium adds a mapping, OpenEnv wraps it."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned[0]
    return getattr(returned, "observation", returned)


def step_of(returned: Any) -> Step:
    """What ``step`` returned, in the shape of any library.

    Example:
        >>> step_of(("a wall", 0.0, False, True, {}))
        Step(observation='a wall', reward=0.0, done=True)
    """
    if hasattr(returned, "reward") and hasattr(returned, "done"):  # OpenEnv: a result, or the observation itself
        return Step(getattr(returned, "observation", returned), float(returned.reward or 0.0), bool(returned.done))
    if isinstance(returned, Mapping) and {"observation", "reward", "done"} <= returned.keys():
        return Step(returned["observation"], float(returned["reward"] or 0.0), bool(returned["done"]))
    if isinstance(returned, tuple) and len(returned) == 5:  # Gymnasium
        observation, reward, terminated, truncated, _ = returned
        return Step(observation, float(reward), bool(terminated or truncated))
    if isinstance(returned, tuple) and len(returned) == 4:  # Gym, and others whose last is a second way to end
        observation, reward, done, more = returned
        return Step(observation, float(reward), bool(done) or more is True)
    raise ConfigurationError(
        f"the environment's step() returned {type(returned).__name__}, which has no shape that is known: return "
        "(observation, reward, terminated, truncated, info), or an object with observation, reward and done"
    )


def describe(observation: Any) -> str:
    """An observation as the model reads it."""
    if hasattr(observation, "model_dump"):  # pydantic
        observation = observation.model_dump()
    elif dataclasses.is_dataclass(observation) and not isinstance(observation, type):
        observation = dataclasses.asdict(observation)
    else:
        return as_text(observation)
    return as_text({name: value for name, value in observation.items() if name not in _NO_OBSERVATION})


def tool_methods(environment: Any) -> list[str]:
    """Names of the public methods that have a docstring, of an environment or its class."""
    return [
        name
        for name, member in inspect.getmembers(environment, inspect.isroutine)
        if not name.startswith("_") and name not in _NO_TOOLS and inspect.getdoc(member)
    ]
