"""Surrogates, corrections and penalties against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rft.errors import ConfigurationError
from lightning_rft.trainer.objectives.corrections import Masked, Truncated
from lightning_rft.trainer.objectives.penalties import KL, kl_divergence
from lightning_rft.trainer.objectives.surrogates import (
    Clip,
    Gamma,
    Likelihood,
    Plain,
    SoftGate,
    Squared,
    StopGradient,
    Surrogate,
)
from lightning_rft.trainer.objectives.tokens import TokenBatch, log_ratio

SURROGATES = [Clip(), Clip(dual=None), Plain(), Likelihood(), StopGradient(), SoftGate(), Squared(), Gamma()]


def at_ratio(surrogate: Surrogate, ratio: float, advantage: float) -> tuple[float, bool, float]:
    """Loss, whether the gradient was cut, and the gradient with respect to the log-prob."""
    logprobs = torch.tensor([math.log(ratio) - 2.0], dtype=torch.float64, requires_grad=True)
    loss, cut = surrogate(logprobs + 2.0, logprobs, torch.tensor([advantage], dtype=torch.float64))
    loss.sum().backward()
    assert logprobs.grad is not None
    return loss.item(), bool(cut), logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "cut", "gradient"),
    [
        (1.0, 2.0, -2.0, False, -2.0),
        (1.25, 2.0, -2.5, False, -2.5),
        (1.5, 2.0, -2.6, True, 0.0),  # already likelier by more than `high`
        (0.5, 2.0, -1.0, False, -1.0),  # far below, but pulled up again
        (0.5, -2.0, 1.6, True, 0.0),  # already less likely by more than `low`
        (0.9, -2.0, 1.8, False, 1.8),
        (2.5, -2.0, 5.0, False, 5.0),  # far above, and pulled down again
        (3.5, -2.0, 6.0, True, 0.0),  # so far above that it would rule the batch
        (3.5, 2.0, -2.6, True, 0.0),
        (1.5, 0.0, 0.0, False, 0.0),
    ],
)
def test_clip(ratio: float, advantage: float, loss: float, cut: bool, gradient: float) -> None:
    found = at_ratio(Clip(low=0.2, high=0.3, dual=3.0), ratio, advantage)
    assert found == (pytest.approx(loss), cut, pytest.approx(gradient))


@pytest.mark.parametrize(
    ("surrogate", "ratio", "advantage", "gradient"),
    [
        (Clip(dual=None), 9.0, -2.0, 18.0),
        (Plain(), 9.0, 2.0, -18.0),
        (Likelihood(), 9.0, 2.0, -2.0),
        (StopGradient(), 4.0, 2.0, -8.0),
        (StopGradient(), 9.0, 2.0, -10.0),
        (StopGradient(positive=(1.0, 1.0), negative=(0.0, 1.0)), 0.25, 2.0, -2.0),
        (StopGradient(positive=(1.0, 1.0), negative=(0.0, 1.0)), 0.25, -2.0, 0.5),
        (StopGradient(positive=(1.0, 1.0), negative=(0.0, 1.0)), 4.0, -2.0, 2.0),
        (SoftGate(), 1.0, 2.0, -2.0),
        (SoftGate(positive=2.0), 2.0, 1.0, -4 * 2 * math.exp(2) / (1 + math.exp(2)) ** 2),
        (Squared(0.5), math.e, 2.0, 0.5 - 2.0),
        (Gamma(), 1.0, 2.0, -2.0),
        (Gamma(positive=(2.0, 3.0)), 2.0, 1.0, -4 * math.exp(-3)),
        (Gamma(negative=(3.0, 2.0)), 2.0, -1.0, 8 * math.exp(-2)),
    ],
)
def test_gradients_by_hand(surrogate: Surrogate, ratio: float, advantage: float, gradient: float) -> None:
    assert at_ratio(surrogate, ratio, advantage)[2] == pytest.approx(gradient)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda surrogate: type(surrogate).__name__)
@given(advantage=st.floats(-5, 5), level=st.sampled_from(["token", "sequence", "product"]))
def test_at_ratio_1_each_is_the_plain_policy_gradient(surrogate: Surrogate, advantage: float, level: str) -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    values = logprobs.detach()
    tokens = TokenBatch(
        logprobs, values, torch.full_like(values, advantage), torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    )
    loss, _ = surrogate(log_ratio(tokens, level, corrected=False), logprobs, tokens.advantages)  # type: ignore[arg-type]
    loss.sum().backward()
    # a sample's ratio has the gradient of all its tokens, which averages undo
    times = torch.tensor([2.0, 2.0, 1.0]) if level == "product" and ratio_matters(surrogate) else torch.ones(3)
    torch.testing.assert_close(logprobs.grad, -advantage * times.double())


def ratio_matters(surrogate: Surrogate) -> bool:
    """Whether the gradient flows through the ratio and not through the log-prob."""
    return isinstance(surrogate, (Clip, Plain, SoftGate))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda surrogate: type(surrogate).__name__)
@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("gap", [50.0, -50.0, 5000.0, -5000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_extreme_ratios_stay_finite(surrogate: Surrogate, level: str, gap: float, advantage: float) -> None:
    logprobs = torch.full((2,), gap - 5000.0, requires_grad=True)
    tokens = TokenBatch(
        logprobs,
        torch.full((2,), -5000.0),
        torch.full((2,), advantage),
        torch.zeros(2, dtype=torch.long),
        torch.tensor([2]),
    )
    loss, _ = surrogate(log_ratio(tokens, level, corrected=False), logprobs, tokens.advantages)  # type: ignore[arg-type]
    for correction in (Truncated(), Masked(level="product"), Masked(level="sequence", weighted=False)):
        loss = loss * correction(tokens)
    loss = loss + sum(kl_divergence(logprobs, tokens.sampling_logprobs, kind) for kind in ("k1", "k2", "k3"))  # type: ignore[arg-type]
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Clip(low=0.0), "low"),
        (lambda: Clip(low=1.1), "low"),
        (lambda: Clip(low=math.nan), "low"),
        (lambda: Clip(high=0.0), "high"),
        (lambda: Clip(high=math.nan), "high"),
        (lambda: Clip(dual=1.1), "dual"),
        (lambda: StopGradient(positive=(2.0, 1.0)), "positive"),
        (lambda: StopGradient(negative=(-1.0, 1.0)), "negative"),
        (lambda: SoftGate(negative=0.0), "negative"),
        (lambda: Squared(-1.0), "strength"),
        (lambda: Truncated(high=0.0), "high"),
        (lambda: Masked(low=2.0, high=1.0), "low"),
        (lambda: Masked(high=math.nan), "high"),
        (lambda: KL(-1.0), "coefficient"),
        (lambda: KL(0.1, "k3", "reward"), "estimator"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(make: object, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        make()  # type: ignore[operator]


# Corrections


def drifted() -> TokenBatch:
    """Two samples, of three tokens and of one; the ratios are 1/2, 2, 8 and 4."""
    ratios = torch.tensor([0.5, 2.0, 8.0, 4.0]).log()
    return TokenBatch(
        ratios - 9, torch.full((4,), -9.0), torch.ones(4), torch.tensor([0, 0, 0, 1]), torch.tensor([3, 1])
    )


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        (Truncated(3.0), [0.5, 2.0, 3.0, 3.0]),
        (Truncated(3.0, level="sequence"), [2.0, 2.0, 2.0, 3.0]),
        (Truncated(5.0, level="product"), [5.0, 5.0, 5.0, 4.0]),
        (Masked(0.6, 5.0), [0.0, 2.0, 0.0, 4.0]),
        (Masked(0.6, 5.0, weighted=False), [0.0, 1.0, 0.0, 1.0]),
        (Masked(0.0, 5.0, level="product"), [0.0, 0.0, 0.0, 4.0]),
        (Masked(0.9, 2.1, level="sequence", weighted=False), [1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_weights_by_hand(correction: Truncated | Masked, weights: list[float]) -> None:
    torch.testing.assert_close(correction(drifted()), torch.tensor(weights))


def test_tokens_in_other_micro_batches_count_for_their_sample() -> None:
    whole = drifted()
    part = TokenBatch(
        whole.logprobs[:1],
        whole.sampling_logprobs[:1],
        whole.advantages[:1],
        whole.sample[:1],
        whole.lengths[:1],
        elsewhere=(whole.logprobs - whole.sampling_logprobs)[1:3].sum()[None],
    )
    for correction in (Truncated(5.0, level="product"), Masked(0.9, 2.1, level="sequence")):
        torch.testing.assert_close(correction(part), correction(whole)[:1])
    for level in ("sequence", "product"):
        found, expected = (log_ratio(tokens, level, corrected=False) for tokens in (part, whole))  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected[:1])


# Penalties


def test_k3_by_hand() -> None:
    logprobs, other = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-1.0, -2.0, -3.0])
    torch.testing.assert_close(kl_divergence(logprobs, other, "k3"), torch.tensor([0.0, math.e - 2, 1 / math.e]))


def test_estimators_have_the_right_direction() -> None:
    drawn, other = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (drawn * (drawn.log() - other.log())).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((drawn * kl_divergence(drawn.log(), other.log(), estimator)).sum(), exact)  # type: ignore[arg-type]
    assert (kl_divergence(drawn.log(), other.log(), "k3") >= 0).all()


def test_k3_of_a_small_difference_is_precise() -> None:
    assert kl_divergence(torch.tensor([0.0]), torch.tensor([-0.001]), "k3").item() == pytest.approx(5e-7, rel=1e-3)
