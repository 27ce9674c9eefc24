"""The ready rewards, and what may pass as a reward."""

from __future__ import annotations

import functools
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.reward_calls import check_reward
from lightning_rft.rewards import check_answers, contains_answer, exact_match, last_number
from lightning_rft.scores import as_reward


def task(answer: Any) -> Task:
    return Task("question", answer=answer, id="t7")


def test_exact_match() -> None:
    assert exact_match(" 42\n", task(42)) == 1.0
    assert exact_match("yes", task(" yes ")) == 1.0
    assert exact_match("42.", task(42)) == 0.0
    assert exact_match("Yes", task("yes")) == 0.0


def test_contains_answer() -> None:
    assert contains_answer("The capital is Paris.", task("Paris\n")) == 1.0
    assert contains_answer("The capital is paris.", task("Paris")) == 0.0


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("The answer is 42.", 42, 1.0),
        ("42 or rather 43", 42, 0.0),
        ("so 1,234,567 in all", "1234567", 1.0),
        ("1234567", "1,234,567", 1.0),
        ("1,000.50", 1000.5, 1.0),
        ("1,2,3", 3, 1.0),
        ("1,2345", 2345, 1.0),
        ("x = -3", -3, 1.0),
        ("x = \N{MINUS SIGN}3", -3, 1.0),
        ("x = 3", -3, 0.0),
        ("5-3", 3, 1.0),
        ("5 - 3", 3, 1.0),
        ("(5)-3", 3, 1.0),
        ("$-3", -3, 1.0),
        ("0.10", "0.1", 1.0),
        ("half, or .5", 0.5, 1.0),
        ("-.5", -0.5, 1.0),
        ("3.0", 3, 1.0),
        ("007", 7, 1.0),
        ("1e-05", 0.00001, 1.0),
        ("2E3", 2000, 1.0),
        ("9007199254740993", "9007199254740992", 0.0),
        ("9 * 8 = 72", "9 * 8 is 72\n#### 72", 1.0),
        ("none", 0, 0.0),
        ("", 0, 0.0),
        ("1e99999999999999999999", 5, 0.0),
    ],
)
def test_last_number(completion: str, answer: Any, reward: float) -> None:
    assert last_number(completion, task(answer)) == reward


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)), st.text("ab .,\n-"))
def test_last_number_reads_what_python_writes(number: float, before: str) -> None:
    assert last_number(f"{before} is {number}", task(number)) == 1.0
    assert last_number(f"{before} is {number}. ", task(number)) == 1.0


@given(st.integers())
def test_last_number_reads_thousands(number: int) -> None:
    assert last_number(f"= {number:,}", task(number)) == 1.0


@given(st.text(), st.text())
def test_last_number_takes_any_text(completion: str, answer: str) -> None:
    assert last_number(completion, task(f"{answer} 1")) in (0.0, 1.0)


@pytest.mark.parametrize("reward", [exact_match, contains_answer, last_number])
@pytest.mark.parametrize("answer", [None, float("nan"), "", " "])
def test_a_task_without_answer_is_an_error(reward: Any, answer: Any) -> None:
    with pytest.raises(ConfigurationError, match="'t7' has none: set its `answer`"):
        reward("None", task(answer))


def test_an_answer_without_number_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no number in the answer 'yes' of task 't7'"):
        last_number("3", task("yes"))


class Scalar:
    """A 0-dimensional array as any library has it."""

    shape: tuple[int, ...] = ()

    def __float__(self) -> float:
        return 0.5


class Vector(Scalar):
    shape = (1,)


class Vexed(Scalar):
    def __float__(self) -> float:
        raise TypeError("on another device")


@pytest.mark.parametrize(
    ("value", "reward"),
    [(1, 1.0), (0.25, 0.25), (True, 1.0), (-3, -3.0), (Scalar(), 0.5), (Decimal("0.5"), 0.5), (Fraction(1, 4), 0.25)],
)
def test_numbers_are_rewards(value: object, reward: float) -> None:
    result = as_reward(value, "t7")
    assert result == reward and type(result) is float


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1",
        b"1",
        float("nan"),
        float("inf"),
        -float("inf"),
        [1.0],
        {},
        1j,
        10**400,
        1e39,
        -1e300,
        Vector(),
        Vexed(),
        object(),
    ],
)
def test_anything_else_is_an_error(value: object) -> None:
    with pytest.raises(
        ConfigurationError, match=r"(?s)reward returned .* for task 't7': return a finite float"
    ) as error:
        as_reward(value, "t7")
    assert len(str(error.value)) < 400


def test_answers_are_checked_where_a_reward_of_ours_needs_them() -> None:
    tasks = [task(3), Task("question", id="t8")]
    check_answers(lambda completion, task: 1.0, tasks)
    check_answers(None, tasks)
    check_answers(last_number, tasks[:1])
    with pytest.raises(ConfigurationError, match="'t8' has none: set its `answer`"):
        check_answers(last_number, tasks)


def test_scalars_of_array_libraries() -> None:
    numpy = pytest.importorskip("numpy")
    for value in (numpy.float32(0.5), numpy.array(0.5), numpy.float64(0.5)):
        assert type(as_reward(value)) is float and as_reward(value) == 0.5
    assert as_reward(numpy.bool_(True)) == 1.0 and as_reward(numpy.int64(3)) == 3.0
    for value in (numpy.array([0.5]), numpy.float32("nan"), numpy.str_("1")):
        with pytest.raises(ConfigurationError):
            as_reward(value)


def test_scalars_of_torch() -> None:
    torch = pytest.importorskip("torch")
    assert as_reward(torch.tensor(0.5)) == 0.5 and as_reward(torch.tensor(True)) == 1.0
    for value in (torch.tensor([0.5]), torch.tensor(float("nan")), torch.zeros(2)):
        with pytest.raises(ConfigurationError):
            as_reward(value)


def test_check_reward_accepts() -> None:
    class Method:
        def __call__(self, completion: str, task: Task, scale: float = 1.0) -> float:
            return scale

        def judge(self, completion: str, task: Task) -> float:
            return 1.0

    for reward in (
        exact_match,
        lambda completion, task: 1.0,
        lambda *values: 1.0,
        lambda completion, task, sample: 1.0,
        lambda completion, task, *, sample: 1.0,
        functools.partial(lambda scale, completion, task: scale, 2.0),
        Method(),
        Method().judge,
        min,  # tells no signature
    ):
        check_reward(reward)


@pytest.mark.parametrize(
    "reward", [None, "exact_match", 3, lambda completion: 1.0, lambda a, b, c: 1.0, lambda a, *, task: 1.0, lambda: 1.0]
)
def test_check_reward_refuses(reward: object) -> None:
    with pytest.raises(ConfigurationError, match=r"reward .*`reward\(completion: str, task: Task\) -> float`"):
        check_reward(reward)


def test_rewards_import_no_tensor_library() -> None:
    code = "import sys, lightning_rft.rewards; print({'torch', 'numpy'} & sys.modules.keys())"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "set()"
