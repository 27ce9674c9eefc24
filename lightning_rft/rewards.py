"""Reward functions, and the checks that every reward function must pass.

A reward is any callable ``reward(completion: str, task: Task) -> float``; the ones here compare with
:attr:`Task.answer`. One that has a parameter ``sample`` is given the :class:`Sample` too. They need no tensor library.
"""

from __future__ import annotations

import inspect
import math
import re
import reprlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task, Turn

__all__ = [
    *("Sample", "as_reward", "check_answers", "check_reward", "contains_answer", "exact_match", "last_number"),
    *("last_number_or_text", "wants_sample"),
]

_NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z_)\]])-)?"  # a minus directly after an operand is a subtraction: "5-3" ends in 3
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"  # "1,2,3" is three numbers
    r"(?:[eE][+-]?[0-9]{1,4}(?![0-9]))?"  # Python writes 0.00001 as "1e-05"
)


@dataclass(frozen=True)
class Sample:
    """What the policy sampled, for a reward with a parameter ``sample``.

    Args:
        turns: Calls of the policy in order, with the ids that each read and sampled.
        raw_texts: Answer of each turn as text, special tokens included.

    Example::

        def reward(completion, task, sample):
            return float("</think>" in sample.raw_texts[-1])
    """

    turns: tuple[Turn, ...]
    raw_texts: tuple[str, ...]


def exact_match(completion: str, task: Task) -> float:
    r"""1.0 if the completion equals the answer, surrounding white space aside, else 0.0.

    Example:
        >>> exact_match(" 4\n", Task("2 + 2 =", answer=4))
        1.0
    """
    return float(completion.strip() == _answer(task, "exact_match"))


def contains_answer(completion: str, task: Task) -> float:
    """1.0 if the completion contains the answer (case-sensitive), else 0.0.

    Example:
        >>> contains_answer("It is Paris.", Task("Capital of France?", answer="Paris"))
        1.0
    """
    return float(_answer(task, "contains_answer") in completion)


def last_number(completion: str, task: Task) -> float:
    """1.0 if the last number in the completion equals the last number in the answer, else 0.0.

    Numbers are compared by their exact value: ``1,000.50`` equals ``1000.5``. The last number of the answer counts too,
    so worked solutions that end in the result (GSM8K's ``#### 42``) can serve as answers.

    Example:
        >>> last_number("12 * 100 = 1,200.", Task("12 * 100 =", answer="1200"))
        1.0
        >>> last_number("I do not know.", Task("12 * 100 =", answer="1200"))
        0.0
    """
    expected = _last_number(_answer(task, "last_number"))
    if expected is None:
        raise ConfigurationError(
            f"reward last_number finds no number in the answer {task.answer!r} of task {task.id!r}: give a number as "
            "its answer, or use exact_match or contains_answer"
        )
    return float(_last_number(completion) == expected)


def last_number_or_text(text: str) -> Decimal | str:
    """The last number in a text, or without one the text itself, surrounding white space aside.

    Example:
        >>> last_number_or_text("12 * 100 = 1,200.") == last_number_or_text("1200")
        True
    """
    number = _last_number(text)
    return text.strip() if number is None else number


def as_reward(value: object, task_id: str = "") -> float:
    """What a reward function returned for a task, as a float that is finite in float32, in which it is trained.

    Raises :class:`ConfigurationError` unless it is a number: int, float, bool, or a scalar of an array library.

    Example:
        >>> as_reward(True)
        1.0
    """
    # Numbers of every library have __float__, but so has numpy's string; of arrays only shape () is a scalar.
    if hasattr(value, "__float__") and not isinstance(value, str | bytes) and getattr(value, "shape", ()) == ():
        try:
            reward = float(value)
            struct.pack("<f", reward)  # raises where it would become infinite
        except Exception as error:  # any class may have a __float__
            raise ConfigurationError(_bad_reward(value, task_id)) from error
        if math.isfinite(reward):
            return reward
    raise ConfigurationError(_bad_reward(value, task_id))


def check_reward(reward: object) -> None:
    """Raises :class:`ConfigurationError` for a reward function that cannot be called as explorers will call it."""
    expected = "give a function `reward(completion: str, task: Task) -> float`"
    if not callable(reward):
        raise ConfigurationError(f"reward is {reward!r}, which cannot be called: {expected}")
    signature = _signature(reward)
    if signature is None:  # the first call shows
        return
    try:
        signature.bind(object(), object(), **({"sample": object()} if wants_sample(reward) else {}))
    except TypeError as error:
        raise ConfigurationError(f"reward {reward!r} has the signature {signature} ({error}): {expected}") from error


def wants_sample(reward: Callable[..., Any]) -> bool:
    """Whether a reward function has a parameter ``sample``."""
    signature = _signature(reward)
    return signature is not None and "sample" in list(signature.parameters)[2:]


def check_answers(reward: Callable[..., Any] | None, tasks: Iterable[Task]) -> None:
    """Raises :class:`ConfigurationError` for a task without the answer that one of this file's rewards needs."""
    if reward in (exact_match, contains_answer, last_number):
        for task in tasks:
            reward("", task)


def _signature(reward: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(reward)
    except (TypeError, ValueError):  # some callables written in C have none
        return None


def _answer(task: Task, reward: str) -> str:
    # str(None) would reward a completion that says "None", and an empty answer is contained in everything.
    missing = task.answer is None or (isinstance(task.answer, float) and math.isnan(task.answer))
    answer = "" if missing else str(task.answer).strip()
    if not answer:
        raise ConfigurationError(f"reward {reward} needs an answer, task {task.id!r} has none: set its `answer`")
    return answer


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def _bad_reward(value: object, task_id: str) -> str:
    try:
        shown = reprlib.repr(value)
    except Exception as error:  # any class may have a __repr__
        shown = f"what has no repr ({type(error).__name__})"
    return f"reward returned {shown} ({type(value).__name__}) for task {task_id!r}: return a finite float"
