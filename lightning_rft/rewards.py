"""Ready reward functions, which compare with :attr:`Task.answer`, and the values that rewards read and return.

A reward is any callable ``reward(completion: str, task: Task)`` that returns a number, a mapping of parts by name whose
sum it is, or a :class:`Score`. One that has a parameter ``sample`` is given the :class:`Sample` too. One whose first
parameters are named ``completions`` and ``tasks`` is called once for all samples of a task, with lists (and with
``samples``, if it has that), and returns a list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.reward_calls import RewardSum
from lightning_rft.scores import Answer, Sample, Score

__all__ = [
    "Answer",
    "RewardSum",
    "Sample",
    "Score",
    "check_answers",
    "contains_answer",
    "exact_match",
    "last_number",
    "last_number_or_text",
]

_NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z_)\]])-)?"  # a minus directly after an operand is a subtraction: "5-3" ends in 3
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"  # "1,2,3" is three numbers
    r"(?:[eE][+-]?[0-9]{1,4}(?![0-9]))?"  # Python writes 0.00001 as "1e-05"
)


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


def check_answers(reward: Callable[..., Any] | None, tasks: Iterable[Task]) -> None:
    """Raises :class:`ConfigurationError` for a task without the answer that one of this file's rewards needs."""
    parts = reward.parts.values() if isinstance(reward, RewardSum) else [reward]
    ours = [part for part in (exact_match, contains_answer, last_number) if part in parts]
    for task in tasks if ours else ():
        for part in ours:
            part("", task)


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
