"""What is stored comes back equal, bit by bit, or not at all."""

from __future__ import annotations

import math
import sqlite3
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rft.buffer.codec import from_row, to_row, unpack
from lightning_rft.experience import Experience, Turn
from tests.random_turns import turns

FINITE = st.floats(allow_nan=False, allow_infinity=False)
NAMED = st.dictionaries(st.text("azAZ09_.-", min_size=1, max_size=5), FINITE, max_size=3)
EXPERIENCES = st.builds(
    Experience,
    task_id=st.just("7"),
    sample=st.integers(0, 9),
    turns=st.lists(turns(), min_size=1, max_size=3).map(tuple),
    reward=FINITE,
    text=st.text(st.characters(codec="utf-8")),
    generate_seconds=st.floats(0, 1e6),
    reward_seconds=st.floats(0, 1e6),
    rewards=NAMED,
    metrics=NAMED,
).filter(lambda experience: experience.num_tokens)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EXPERIENCES)
def test_an_experience_comes_back_through_a_row(experience: Experience) -> None:
    row = to_row(experience)
    assert from_row("7", row) == experience
    assert row[3:6] == (experience.num_tokens, experience.oldest_version, experience.newest_version)


def test_a_tree_of_turns_comes_back() -> None:
    first = Turn((1,), (2, 3), (-0.5, -0.5), (0, 0), "stop", reward=0.25)
    branches = (Turn((1, 2, 3, 9), (n,), (-1.0,), (1,), "stop", parent=0) for n in (4, 5))
    experience = Experience("7", 0, (first, *branches), 1.0)
    assert from_row("7", to_row(experience)) == experience


@pytest.mark.parametrize("logprob", [-0.1, -0.5, float("-inf"), -0.0, -1e-45, float("nan")])
def test_a_logprob_keeps_its_bits(logprob: float) -> None:
    (turn,) = unpack(to_row(Experience("t", 0, (Turn((1,), (2,), (logprob,), (3,), "stop"),), 1.0))[-1], 0, 1.0, "{}")
    if math.isnan(logprob):
        assert math.isnan(turn.logprobs[0])
    else:
        assert turn.logprobs.tobytes() == struct.pack("f", logprob)


def test_a_token_takes_eight_bytes() -> None:
    def size(n: int) -> int:
        return len(to_row(Experience("t", 0, (Turn((), (2,) * n, (-0.1,) * n, (3,) * n, "stop"),), 1.0))[-1])

    assert size(200) - size(100) == 800


@settings(deadline=None)
@given(st.data())
def test_a_flipped_bit_is_noticed(data: st.DataObject) -> None:
    turn = Turn((1, 2), (3, 4), (-0.1, -0.2), (5, 6), "stop")
    blob = bytearray(to_row(Experience("t", 0, (turn,), 1.0))[-1])
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(sqlite3.DatabaseError, match="malformed"):
        unpack(bytes(blob), 0, 1.0, "{}")


@pytest.mark.parametrize("change", [{0: 1}, {1: -0.0}, {1: 0.5}, {2: "{"}], ids=["sample", "sign", "reward", "parts"])
def test_a_changed_number_is_noticed(change: dict[int, Any]) -> None:
    row = dict(enumerate(to_row(Experience("t", 0, (Turn((1,), (2,), (-0.5,), (3,), "stop"),), 0.0))))
    with pytest.raises(sqlite3.DatabaseError, match="malformed"):
        from_row("t", tuple((row | change).values()))


@pytest.mark.parametrize("metrics", ["", "{", "[1]", '{"a": "b"}', '{"a": nul}'])
def test_damaged_metrics_are_noticed(metrics: str) -> None:
    row = to_row(Experience("t", 0, (Turn((1,), (2,), (-0.5,), (3,), "stop"),), 0.0, metrics={"a": 1.0}))
    with pytest.raises(sqlite3.DatabaseError, match="malformed"):
        from_row("t", [metrics if value == '{"a": 1.0}' else value for value in row])
