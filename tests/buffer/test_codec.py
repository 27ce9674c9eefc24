"""What is stored comes back equal, bit by bit, or not at all."""

from __future__ import annotations

import math
import sqlite3
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rft.buffer.codec import from_row, to_row, unpack
from lightning_rft.experience import Experience, Turn

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
LOGPROBS = st.one_of(
    st.lists(st.floats(max_value=0.0), max_size=5).map(tuple),
    st.lists(st.floats(max_value=0.0, width=32), max_size=5).map(tuple),
)
TURNS = st.builds(
    Turn,
    IDS,
    IDS,
    LOGPROBS,
    st.lists(st.integers(0, 2**40), max_size=5).map(tuple),
    st.sampled_from(("stop", "length")),
)
EXPERIENCES = st.builds(
    Experience,
    task_id=st.just("7"),
    sample=st.integers(0, 9),
    turns=st.lists(TURNS, min_size=1, max_size=3).map(tuple),
    reward=st.floats(allow_nan=False, allow_infinity=False),
    text=st.text(st.characters(codec="utf-8")),
    generate_seconds=st.floats(0, 1e6),
    reward_seconds=st.floats(0, 1e6),
).filter(lambda experience: any(turn.versions for turn in experience.turns))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EXPERIENCES)
def test_an_experience_comes_back_through_a_row(experience: Experience) -> None:
    row = to_row(experience)
    assert from_row("7", row) == experience
    assert row[2:5] == (experience.num_tokens, experience.oldest_version, experience.newest_version)


@pytest.mark.parametrize("logprob", [-0.1, -0.5, float("-inf"), -0.0, -1e300, -5e-324, float("nan")])
def test_a_logprob_keeps_its_bits(logprob: float) -> None:
    (turn,) = unpack(to_row(Experience("t", 0, (Turn((1,), (2,), (logprob,), (3,), "stop"),), 1.0))[-1])
    if math.isnan(logprob):
        assert math.isnan(turn.logprobs[0])
    else:
        assert struct.pack("d", turn.logprobs[0]) == struct.pack("d", logprob)


def test_what_engines_compute_in_float32_takes_four_bytes() -> None:
    def size(logprob: float) -> int:
        return len(to_row(Experience("t", 0, (Turn((), (2,) * 100, (logprob,) * 100, (3,) * 100, "stop"),), 1.0))[-1])

    assert size(-0.1) - size(-0.125) == 400


@settings(deadline=None)
@given(st.data())
def test_a_flipped_bit_is_noticed(data: st.DataObject) -> None:
    turn = Turn((1, 2), (3, 4), (-0.1, -0.2), (5, 6), "stop")
    blob = bytearray(to_row(Experience("t", 0, (turn,), 1.0))[-1])
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(sqlite3.DatabaseError, match="malformed"):
        unpack(bytes(blob))
