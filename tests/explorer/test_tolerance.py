"""How many failures are too many."""

from __future__ import annotations

import pytest

from lightning_rft.channel import Failure
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, GroupKey
from lightning_rft.explorer.messages import Explored
from lightning_rft.run.tolerance import Tolerance


def group(good: int, *errors: Exception) -> Explored:
    experiences = tuple(Experience("t", index, (), 0.0) for index in range(good))
    return Explored(1, GroupKey(0, 0), 1, "t", experiences, tuple(map(Failure.of, errors)), retried=1)


def test_the_first_failure_does_not_end_a_run() -> None:
    tolerance = Tolerance(0.25, window=16)
    tolerance.take(group(0, *map(LookupError, "abcd")), "here")
    assert (tolerance.failed, tolerance.retried) == (4, 1)


def test_too_many_end_it_with_the_first() -> None:
    tolerance = Tolerance(0.25, window=16)
    tolerance.take(group(2, KeyError("first"), LookupError("second")), "here")
    tolerance.take(group(2, LookupError("third"), LookupError("fourth")), "here")
    with pytest.raises(KeyError, match="first"):
        tolerance.take(group(3, LookupError("fifth")), "here")


def test_old_failures_are_forgotten() -> None:
    tolerance = Tolerance(0.25, window=8)
    for _ in range(100):  # 1 of 8 lately, 100 in all
        tolerance.take(group(7, LookupError("now and then")), "here")
    with pytest.raises(LookupError):
        tolerance.take(group(5, *map(LookupError, "abc")), "here")


def test_what_trying_again_would_not_change_ends_it_at_once() -> None:
    with pytest.raises(ConfigurationError, match="not a number"):
        Tolerance(1.0, window=1000).take(group(7, ConfigurationError("not a number")), "here")


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="max_error_rate"):
        Tolerance(rate, window=8)
