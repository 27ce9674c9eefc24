"""Turns as values: packed once, read as arrays, equal bit by bit, and refused where lengths do not fit."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Support, Turn
from tests.random_turns import turns

PLAIN: dict[str, Any] = {
    "prompt_ids": (1, 2),
    "token_ids": (3, 4, 5),
    "logprobs": (-0.5, -0.25, -1.0),
    "versions": (0, 0, 1),
    "finish_reason": "stop",
}


def make_turn(**changes: Any) -> Turn:
    return Turn(**PLAIN | changes)


def test_arrays_read_as_they_were_given() -> None:
    turn = make_turn()
    for name, dtype in {"prompt_ids": "i4", "token_ids": "i4", "logprobs": "f4", "versions": "i4"}.items():
        values = getattr(turn, name)
        assert values.dtype == dtype and tuple(values) == PLAIN[name]
    assert turn.num_tokens == 3 and turn.version_runs == [(0, 2), (1, 1)]
    assert turn.teacher_logprobs is None and turn.support is None
    with pytest.raises(ValueError, match="read-only"):
        turn.token_ids[0] = 7
    with pytest.raises(FrozenInstanceError):
        turn.reward = 1.0  # type: ignore[misc]


def test_what_it_is_made_from_does_not_matter() -> None:
    arrays = {name: np.array(values) for name, values in PLAIN.items() if name != "finish_reason"}
    views = {name: getattr(make_turn(), name) for name in arrays}
    assert make_turn() == make_turn(**arrays) == make_turn(**views) == Turn(*make_turn().packed())


@settings(deadline=None)
@given(turns())
def test_a_pickled_turn_is_equal(turn: Turn) -> None:
    copy = pickle.loads(pickle.dumps(turn))
    assert copy == turn and hash(copy) == hash(turn) and repr(copy) == repr(turn)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": (1, 3)},
        {"token_ids": (3, 4, 6)},
        {"logprobs": (-0.5, -0.25, -0.0)},
        {"versions": (0, 1, 1)},
        {"finish_reason": "length"},
        {"temperature": 0.5},
        {"parent": 0},
        {"reward": 0.0},
        {"teacher_logprobs": (-0.5, -0.25, -1.0)},
        {"support": Support((1, 1, 1), (3, 4, 5), (0.0, 0.0, 0.0))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_makes_a_difference(change: dict[str, Any]) -> None:
    assert make_turn(**change) != make_turn()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logprobs": (-0.5,)}, "3 token_ids but .*'logprobs': 1"),
        ({"versions": (0, 0, 0, 0)}, "'versions': 4"),
        ({"teacher_logprobs": ()}, "'teacher_logprobs': 0"),
        ({"support": Support((1,), (3,), (0.0,))}, "'support': 1"),
        ({"token_ids": (3, 4, 2**31)}, "int32"),
        ({"token_ids": (3, 4, 5.5)}, "int32"),
        ({"logprobs": (-0.5, -0.25, "x")}, "float32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_turn(**change)


def test_a_support_of_other_lengths_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="2 token_ids and 3 logprobs"):
        Support((1, 2), (3, 4), (0.0, 0.0, 0.0))
    support = Support((1, 2), (3, 4, 5), (0.0, -0.5, -1.0))
    assert (support.counts.tolist(), support.token_ids.tolist()) == ([1, 2], [3, 4, 5])
    assert support.logprobs.tolist() == [0.0, -0.5, -1.0]


def test_a_turn_goes_on_from_its_parent_token_for_token() -> None:
    after = make_turn(prompt_ids=(1, 2, 3, 4, 5, 9), parent=0)
    assert Experience("t", 0, (make_turn(), after, after), 1.0).num_tokens == 9
    for sample, words in (
        ((after,), "turn 0 has parent 0"),
        ((make_turn(), make_turn(parent=2)), "turn 1 has parent 2"),
        ((make_turn(), make_turn(prompt_ids=(1, 2, 3, 4, 9), parent=0)), "turn 1 does not go on from"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            Experience("t", 0, sample, 1.0)


def test_an_explorer_makes_turns_without_numpy() -> None:  # which takes a third of a second to import
    code = (
        "import pickle, sys; from lightning_rft.experience import *; "
        "pickle.dumps(Experience('t', 0, (Turn((1,), (2,), (-0.5,), (0,), 'stop'),), 1.0)); "
        "sys.exit('numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
