"""Sampling checks itself, is passed on whole, and says what training cannot account for."""

from __future__ import annotations

import pickle
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import lightning_rft as rft
from lightning_rft.experience import Truncation
from lightning_rft.sampling import Sampling

EVERYTHING: dict[str, Any] = {
    "max_new_tokens": 9,
    "temperature": 0.7,
    "seed": 3,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.05,
    "stop": ("Q:", "\n\n"),
    "stop_token_ids": (7,),
    "min_new_tokens": 2,
    "logit_bias": {5: -100.0},
    "structured": {"choice": ["yes", "no"]},
    "chat_template_kwargs": {"enable_thinking": False},
}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_k": 2.5}, "top_k=2.5 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p=-0.1 must be from 0 to 1"),
        ({"min_p": float("nan")}, "min_p=nan must be from 0 to 1"),
        ({"stop": ["a", ""]}, "stop=.* must be texts, none of them empty"),
        ({"stop": [1]}, "stop=.* must be texts"),
        ({"stop_token_ids": [-1]}, "stop_token_ids=.* must be token ids"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1 must be at least 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 must be at most max_new_tokens=8"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias=.* must be numbers by token id"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias=.* must be numbers by token id"),
        ({"structured": {"regexp": "a"}}, "structured=.* must be one of choice, regex, json, grammar"),
        ({"structured": {"regex": "a", "json": {"type": "integer"}}}, "structured=.* must be one of"),
        ({"structured": {"choice": "yes"}}, "structured=.* must be one of"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs=.* must be without .*tokenize"),
    ],
)
def test_what_is_out_of_range_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=message):
        Sampling(**setting)


def test_it_is_a_value() -> None:
    sampling = Sampling(**EVERYTHING)
    copy = pickle.loads(pickle.dumps(sampling))
    assert copy == sampling and hash(copy) == hash(sampling)
    assert sampling != Sampling(**EVERYTHING | {"logit_bias": {6: -100.0}})
    assert Sampling(stop="Q:") == Sampling(stop=["Q:"]) and Sampling(stop="Q:").stop == ("Q:",)
    assert repr(Sampling(8, stop="Q:")) == "Sampling(max_new_tokens=8, stop=('Q:',))"


def test_a_config_sets_everything() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--sampling", type=Sampling, default=Sampling())
    parsed = parser.parse_object({"sampling": {**EVERYTHING, "stop": ["Q:", "\n\n"], "stop_token_ids": [7]}})
    assert parser.instantiate(parsed).sampling == Sampling(**EVERYTHING)
    again = parser.parse_string(parser.dump(parsed))
    assert parser.instantiate(again).sampling == Sampling(**EVERYTHING)
    line = ["--sampling.stop", "Q:", "--sampling.logit_bias", '{"5": -100}', "--sampling.top_p", "0.9"]
    parsed = parser.instantiate(parser.parse_args(line)).sampling
    assert parsed == Sampling(stop="Q:", logit_bias={5: -100.0}, top_p=0.9)


def test_what_is_left_out_is_inherited_and_what_is_empty_is_off() -> None:
    training = Sampling(**EVERYTHING)
    assert Sampling().filled(training) == training
    off = {"top_k": 0, "stop": (), "min_new_tokens": 0, "logit_bias": {}, "structured": {}, "min_p": 0.0}
    assert Sampling(**off).filled(training) == Sampling(**EVERYTHING | off)


def test_greedy_sampling_is_not_truncated() -> None:
    sampling = Sampling(**EVERYTHING)
    assert sampling.truncation == Truncation(20, 0.9, 0.05) and sampling.keeps_support
    greedy = Sampling(temperature=0.0).filled(sampling)
    assert greedy.truncation == Truncation() and not greedy.keeps_support
    assert not Sampling(temperature=1.0, top_k=65).keeps_support


@pytest.mark.parametrize(
    "setting",
    [{}, {"stop": "Q:", "stop_token_ids": [3]}, {"chat_template_kwargs": {"a": 1}}, {"top_k": 64}, {"top_k": 1}]
    + [
        {"top_k": 20, **removes}
        for removes in (
            {"top_p": 0.9},
            {"min_p": 0.1},
            {"min_new_tokens": 3},
            {"structured": {"regex": "a+"}},
            {"logit_bias": {4: float("-inf"), 5: -100.0}},
        )
    ]
    + [{"top_p": 1.0, "min_p": 0.0, "min_new_tokens": 0, "structured": {}, "logit_bias": {}}],
)
def test_what_training_takes(setting: dict[str, Any]) -> None:
    Sampling(temperature=1.0, **setting).check_trainable()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0 in training"),
        ({"top_k": 65}, "top_k=65 must be at most 64 in training.*lower it"),
        ({"top_p": 0.9}, "top_p=0.9 keeps tokens from being sampled.*set top_k beside it, from 1 to 64"),
        ({"min_p": 0.1}, "min_p=0.1 keeps .*set top_k"),
        ({"min_new_tokens": 3}, "min_new_tokens=3 keeps .*set top_k"),
        ({"structured": {"regex": "a"}}, "structured=.* keeps .*set top_k"),
        ({"logit_bias": {4: -100.0}}, "logit_bias=.* keeps .*set top_k"),
        ({"logit_bias": {4: 1.0}, "top_k": 8}, "logit_bias={4: 1.0} moves .*-100 or less"),
    ],
)
def test_what_training_does_not_take(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=message):
        Sampling(**{"temperature": 1.0} | setting).check_trainable()
    with pytest.raises(rft.ConfigurationError, match=message):
        data(sampling=Sampling(**setting))
    data(val_sampling=Sampling(**setting))  # where nothing is trained


def data(**settings: Any) -> rft.RFTDataModule:
    return rft.RFTDataModule(
        ["1 + 1 ="], lambda completion, task: 1.0, rft.FakeEngine(), val_tasks=["2 + 2 ="], **settings
    )


def test_the_page_about_it_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "sampling.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["data"].val_sampling.top_k == 20 and callable(names["workflow"])
    assert all(f"| `{field.name}` |" in page for field in fields(Sampling))
