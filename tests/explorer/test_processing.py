"""What sampling makes of logits: temperature, min_p, top_k and then top_p, after bans and a minimum length."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lightning_rft.explorer.engines.processing import choices, drawn_from
from lightning_rft.explorer.engines.requests import Request, Running
from lightning_rft.sampling import Sampling

VOCABULARY, EOS = 13, 1
LOGITS = st.lists(st.integers(-800, 800).map(lambda n: n / 100), min_size=VOCABULARY, max_size=VOCABULARY, unique=True)


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    return Sampling(
        max_new_tokens=9,
        temperature=draw(st.sampled_from((0.0, 0.3, 1.0, 1.7))),
        top_k=draw(st.none() | st.integers(0, VOCABULARY + 2)),
        top_p=draw(st.none() | st.floats(0.01, 1.0)),
        min_p=draw(st.none() | st.floats(0.0, 1.0)),
        stop_token_ids=draw(st.none() | st.just((2, 3))),
        min_new_tokens=draw(st.none() | st.integers(0, 3)),
        logit_bias=draw(st.none() | st.just({4: -100.0, 5: 1.5, 6: -math.inf})),
    )


def expected(logits: list[float], sampling: Sampling, sampled: int) -> tuple[dict[int, float], bool]:
    """The ids to choose from with their log-probs, by the definitions; and whether none is a border case."""
    left = {token: value + (sampling.logit_bias or {}).get(token, 0.0) for token, value in enumerate(logits)}
    for token in (4, 6) if sampling.logit_bias else ():
        del left[token]
    for token in (EOS, *(sampling.stop_token_ids or ())) if sampled < (sampling.min_new_tokens or 0) else ():
        del left[token]
    ordered = sorted(left, key=lambda token: -left[token])
    clear = True
    if sampling.temperature:
        left = {token: value / sampling.temperature for token, value in left.items()}
        least = [math.exp(left[token] - left[ordered[0]]) - (sampling.min_p or 0.0) for token in ordered]
        kept = [token for token, margin in zip(ordered, least, strict=True) if margin >= 0]
        kept = kept[: sampling.top_k or None]
        total, before, nucleus = sum(math.exp(left[token]) for token in kept), 0.0, []
        margins = []
        for token in kept:
            margins.append(before - (1.0 if sampling.top_p is None else sampling.top_p))
            if margins[-1] < 0 or sampling.top_p in (None, 1.0):
                nucleus.append(token)
            before += math.exp(left[token]) / total
        clear = all(abs(margin) > 1e-5 for margin in (*least, *margins))
        ordered = nucleus
    normaliser = math.log(sum(math.exp(left[token]) for token in ordered))
    return {token: left[token] - normaliser for token in ordered}, clear


def running(sampling: Sampling, sampled: int) -> Running:
    one = Running(Request("r", (1,), sampling), 9)
    one.extend([7] * sampled, [0.0] * sampled, 0)
    return one


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.tuples(LOGITS, samplings(), st.integers(0, 4)), min_size=1, max_size=4))
def test_each_row_is_drawn_from_what_its_request_asks_for(rows: list[tuple[list[float], Sampling, int]]) -> None:
    logits = torch.tensor([logits for logits, *_ in rows])
    found = drawn_from(logits, [running(sampling, sampled) for _, sampling, sampled in rows], {EOS})
    for (row, sampling, sampled), logprobs in zip(rows, found, strict=True):
        truth, clear = expected(row, sampling, sampled)
        assert float(logprobs.exp().sum()) == pytest.approx(1.0, abs=1e-5)
        if clear:
            assert choices(logprobs) == pytest.approx(truth, abs=1e-4)
            assert list(choices(logprobs)) == list(truth)  # most likely first


def test_equally_likely_tokens_are_no_more_than_top_k() -> None:
    sampling = Sampling(9, 1.0, top_k=3)
    logprobs = drawn_from(torch.zeros(1, VOCABULARY), [running(sampling, 0)], {EOS})
    assert len(choices(logprobs[0])) == 3


@pytest.mark.vllm
def test_vllm_truncates_alike() -> None:
    vllm: Any = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 200, generator=random) * 3
    sampling = Sampling(9, 1.0, top_k=20, top_p=0.8)
    ours = drawn_from(logits.clone(), [running(sampling, 0)] * 50, {EOS})
    theirs = vllm.apply_top_k_top_p_pytorch(logits.clone(), torch.full((50,), 20), torch.full((50,), 0.8))
    torch.testing.assert_close(ours, theirs.log_softmax(-1))
