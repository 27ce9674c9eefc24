"""Texts that end an answer: they are found when they are complete, across tokens, and not where they were before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.engines.stops import reach, stop_at
from lightning_rft.explorer.engines.transformers import TransformersEngine
from lightning_rft.sampling import Sampling

PROMPT = (7, 8, 9)

pytestmark = pytest.mark.usefixtures("one_thread")


class Bytes:
    """A tokenizer of which each token is one byte, and token 256 has no text."""

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")


def ids(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize(
    ("said", "stop", "index"),
    [
        ("a cat", ["cat"], 2),
        ("a ca", ["cat"], None),
        ("a cat s", ["cat"], None),  # it was complete before
        ("a cat sat cat", ["cat"], 10),
        ("aaa", ["aa"], 1),
        ("nine", ["ine", "e"], 1),
        ("süß", ["ß"], 2),  # whose last byte alone completes it
        ("é→", ["→"], 1),
    ],
)
def test_the_last_token_completes_it(said: str, stop: list[str], index: int | None) -> None:
    assert stop_at(Bytes(), ids(said), stop) == index


@given(
    said=st.text("abé→", min_size=1, max_size=30), stop=st.lists(st.text("abé→", min_size=1, max_size=4), min_size=1)
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_end_of_an_answer_is_enough_to_find_it(said: str, stop: list[str]) -> None:
    tokens = ids(said)
    for end in range(1, len(tokens) + 1):
        whole = stop_at(Bytes(), tokens[:end], stop)
        tail = stop_at(Bytes(), tokens[:end][-reach(stop) :], stop)
        assert (whole is None) == (tail is None)
        assert whole is None or any(tokens[:end] == ids(said)[:end] and said[whole:].startswith(one) for one in stop)


@pytest.fixture(scope="module")
def engine(tiny_model_path: Path) -> Any:
    engine = TransformersEngine(dtype="float32", device="cpu")
    engine.start(str(tiny_model_path), max_model_len=256, seed=0)
    yield engine
    engine.stop()


def answer(engine: Any, **settings: Any) -> Completion:
    engine.add(Request("r", PROMPT, Sampling(**{"max_new_tokens": 24, "temperature": 1.0, "seed": 3} | settings)))
    while engine.has_work:
        done = engine.step()
    (completion,) = done
    return completion


def test_an_answer_ends_with_the_token_that_completes_a_text(engine: Any, tiny_model_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_path)
    free = answer(engine)
    assert free.finish_reason == "length"
    said = [tokenizer.decode(free.token_ids[:end], skip_special_tokens=True) for end in range(25)]
    text = said[11][-3:]
    stopped = answer(engine, stop=["never", text])
    end = next(end for end in range(25) if text in said[end])
    assert len(text) == 3 and end > 3
    assert stopped.token_ids == free.token_ids[:end] and stopped.finish_reason == "stop"
    assert len(stopped.logprobs) == len(stopped.versions) == end
    assert answer(engine, stop=text, max_new_tokens=end).finish_reason == "stop"  # though it is the last one
    assert answer(engine, stop=text, max_new_tokens=end - 1).finish_reason == "length"


def test_stop_ids_end_an_answer_and_are_part_of_it(engine: Any) -> None:
    free = answer(engine)
    last = free.token_ids[5]
    stopped = answer(engine, stop_token_ids=[last])
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(last) + 1] and stopped.finish_reason == "stop"


def test_nothing_ends_an_answer_before_its_minimum(engine: Any, tiny_model_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_path)
    letters = [tokenizer.decode([token]) for token in range(8, 60)]
    everything = {"stop": letters, "stop_token_ids": list(range(60, 128))}
    assert len(answer(engine, **everything).token_ids) <= 2
    for least in (1, 5, 12):
        ended = answer(engine, **everything, min_new_tokens=least)
        assert least < len(ended.token_ids) <= least + 3
        assert not set(ended.token_ids[:least]) & {1, *range(60, 128)}


def test_the_fake_engine_ends_where_it_must() -> None:
    engine = FakeEngine(mean_tokens=30, vocab_size=16)
    engine.start("anything", max_model_len=256, seed=0)
    ended = [
        answer(engine, max_new_tokens=40, seed=seed, stop_token_ids=[3, 5], min_new_tokens=4, top_k=6)
        for seed in range(40)
    ]
    assert all(4 <= len(one.token_ids) <= 40 for one in ended)
    assert {token for one in ended for token in one.token_ids} == set(range(6))
    assert sum(one.token_ids[-1] in (3, 5) for one in ended) > 20
    assert not any({3, 5} & set(one.token_ids[4:-1]) for one in ended)
    assert all(one.support is not None and set(one.support.counts.tolist()) == {6} for one in ended)
