"""How many failures are too many."""

from __future__ import annotations

import pytest

from lightning_rft.channel import Failure
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, GroupKey
from lightning_rft.explorer.messages import Explored
from lightning_rft.run.error_rate import ErrorRate


def group(good: int, *errors: Exception) -> Explored:
    experiences = tuple(Experience("t", index, (), 0.0) for index in range(good))
    return Explored(1, GroupKey(0, 0), 1, "t", experiences, tuple(map(Failure.of, errors)), retried=1)


def test_the_first_failure_does_not_end_a_run() -> None:
    errors = ErrorRate(0.25, window=16)
    errors.take(group(0, *map(LookupError, "abcd")), "here")
    assert (errors.failed, errors.retried) == (4, 1)


def test_too_many_end_it_with_the_first() -> None:
    errors = ErrorRate(0.25, window=16)
    errors.take(group(2, KeyError("first"), LookupError("second")), "here")
    errors.take(group(2, LookupError("third"), LookupError("fourth")), "here")
    with pytest.raises(KeyError, match="first"):
        errors.take(group(3, LookupError("fifth")), "here")


def test_old_failures_are_forgotten() -> None:
    errors = ErrorRate(0.25, window=8)
    for _ in range(100):  # 1 of 8 lately, 100 in all
        errors.take(group(7, LookupError("now and then")), "here")
    with pytest.raises(LookupError):
        errors.take(group(5, *map(LookupError, "abc")), "here")


def test_what_is_wrong_with_one_sample_costs_that_sample(caplog: pytest.LogCaptureFixture) -> None:
    errors = ErrorRate(0.3, window=16)
    for _ in range(3):  # one of nine: below the rate
        errors.take(group(8, ConfigurationError("not a number")), "here")
    assert errors.failed == 3
    assert [record.message.splitlines()[0] for record in caplog.records] == [
        "a sample of task 't' failed after every retry:"
    ]
    with pytest.raises(ConfigurationError, match="not a number"):
        errors.take(group(2, *[ConfigurationError("others")] * 7), "here")


def test_each_kind_of_failure_is_shown_once(caplog: pytest.LogCaptureFixture) -> None:
    def one() -> None:
        raise LookupError("one")

    def other() -> None:
        raise LookupError("other")

    errors = ErrorRate(1.0, window=100)
    for _ in range(3):
        for fails in (one, other):
            try:
                fails()
            except LookupError as error:
                errors.take(group(1, error), "here")
    assert [record.message.splitlines()[-1] for record in caplog.records] == ["LookupError: one", "LookupError: other"]
