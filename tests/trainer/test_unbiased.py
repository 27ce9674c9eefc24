"""Right in the mean: gradients of many random batches against exact ones, on a policy whose answers are all enumerated.

The exact ones come from the papers' formulas, summed over all batches of a few answers, or from differentiating a sum
over all answers. Gradients are those of what is to rise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_rft as rft
from lightning_rft.trainer.objectives import grpo, reinforce
from lightning_rft.trainer.objectives.objective import Objective
from tests.every_answer import (
    BETWEEN,
    CUT_OFF,
    LONGEST,
    OLDER,
    POLICY,
    REFERENCE,
    SAMPLED,
    TRUTH,
    TablePolicy,
    mean_reward,
)
from tests.exact_gradients import (
    FORMULAS,
    Formula,
    Ratios,
    above_the_others,
    centred,
    over_deviation_of_batch,
    per_constant,
    per_group,
    per_sample,
    per_sequence,
    per_token,
    standardised,
    standardised_in_batch,
    truncated,
)
from tests.mean_gradients import sampled


def centre_share(samples: int) -> float:
    """What is left of the gradient where a sample's own reward is in its baseline."""
    return (samples - 1) / samples


UNBIASED: dict[type[Objective], Callable[[int], float]] = {
    rft.REINFORCE: lambda samples: 1.0,
    rft.RLOO: lambda samples: 1.0,
    rft.DrGRPO: lambda samples: centre_share(samples) / LONGEST,
    rft.OPMD: centre_share,
    rft.AsymRE: centre_share,  # on policy, a shift is a baseline
    rft.TOPR: centre_share,
}


def name(value: Any) -> str | None:
    return getattr(value, "__name__", None)


def test_ratios_lie_between_all_bounds() -> None:
    log_ratios = POLICY.logprobs - OLDER.logprobs
    of_tokens, of_samples = log_ratios[SAMPLED].exp(), log_ratios.sum(-1).exp()
    bounds = [0.0, 0.5, 0.8, 1.2, 1.28, 2.0, 3.0, 5.0, 99.0]
    for low, high in pairwise(bounds):
        assert within(of_tokens, low, high).any(), low
    kept = SAMPLED & ~CUT_OFF[:, None]  # by DAPO
    assert within(log_ratios[kept].exp(), 1.2, 1.28).any()
    bounds = [0.0, 0.8, 1.2, 3.0, 99.0]
    for low, high in pairwise(bounds):
        assert within(of_samples, low, high).any(), low


def test_there_is_a_formula_for_every_preset() -> None:
    assert {preset.__name__ for preset in FORMULAS} == {*grpo.__all__, *reinforce.__all__}


# On policy


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("preset", UNBIASED, ids=name)
def test_unbiased_on_policy(preset: type[Objective], samples: int) -> None:
    found = sampled(preset().on_policy(True), samples=samples)
    found.assert_near(UNBIASED[preset](samples) * TRUTH)


@pytest.mark.parametrize("preset", [preset for preset in FORMULAS if preset not in UNBIASED], ids=name)
def test_biased_by_design_on_policy(preset: type[Objective]) -> None:
    found = sampled(preset().on_policy(True))
    found.assert_near(FORMULAS[preset].expected())
    assert found.points_elsewhere_than(TRUTH)


CENTRED, STANDARDISED = rft.GroupRelative(scale=None), rft.GroupRelative()


@pytest.mark.parametrize(
    ("objective", "advantage", "weight", "groups"),
    [
        (Objective(CENTRED, normalisation="sequence"), centred, per_sequence, 1),
        (Objective(CENTRED, normalisation="token"), centred, per_token, 1),
        (Objective(CENTRED, normalisation="group"), centred, per_group, 2),
        (Objective(STANDARDISED, normalisation="constant"), standardised, per_constant, 1),
        (Objective(rft.GroupRelative(scale="batch"), normalisation=1), over_deviation_of_batch, per_sample, 2),
        (rft.REINFORCEPlusPlus(), standardised_in_batch, per_token, 2),
    ],
    ids=["lengths", "tokens", "tokens-of-groups", "deviation", "deviation-of-batch", "REINFORCE++"],
)
def test_each_division_alone_is_a_bias(objective: Objective, advantage: Any, weight: Any, groups: int) -> None:
    found = sampled(objective.on_policy(True), groups=groups, batches=20_000 if groups == 1 else 8_000)
    found.assert_near(Formula(advantage, weight, lambda r, a: a).expected(groups=groups))
    assert found.points_elsewhere_than(TRUTH)


# Off policy: OLDER samples, POLICY is trained

PRODUCT = rft.Truncated(1e9, level="product")
WHOLE: dict[str, Any] = {"ratio": "product", "normalisation": "sequence"}


@pytest.mark.parametrize(
    ("objective", "factor"),
    [
        (Objective(rft.Raw(), surrogate=rft.Plain(), correction=None, **WHOLE), 1.0),
        (Objective(rft.Raw(0.5), surrogate=rft.Plain(), correction=None, **WHOLE), 1.0),
        (rft.RLOO(surrogate=rft.Plain(), correction=None), 1.0),
        (rft.RLOO(correction=PRODUCT), 1.0),
        (rft.REINFORCE(correction=PRODUCT), 1.0),
        (rft.REINFORCE(correction=rft.Masked(0.0, 1e9, level="product")), 1.0),
        (rft.DrGRPO(correction=PRODUCT), centre_share(2) / LONGEST),
        (rft.TOPR(surrogate=rft.StopGradient((0.0, 1e9), (0.0, 1e9))), centre_share(2)),
    ],
    ids=["plain", "baseline", "leave-one-out", "RLOO", "likelihood", "wide-band", "DrGRPO", "stop-gradient"],
)
def test_unbiased_off_policy_with_ratios_of_whole_samples(objective: Objective, factor: float) -> None:
    found = sampled(objective, by=OLDER, batches=40_000)
    found.assert_near(factor * TRUTH)
    uncorrected = sampled(replace(objective, surrogate=rft.Likelihood(), correction=None), by=OLDER)
    assert uncorrected.points_elsewhere_than(TRUTH)


@pytest.mark.parametrize("preset", FORMULAS, ids=name)
def test_uncorrected_off_policy_the_surrogate_bounds_the_ratio(preset: type[Objective]) -> None:
    found = sampled(replace(preset(), correction=None), by=OLDER)
    found.assert_near(FORMULAS[preset].expected(by=OLDER))
    assert found.points_elsewhere_than(TRUTH)


@pytest.mark.parametrize("preset", [preset for preset in FORMULAS if preset().correction == "auto"], ids=name)
def test_off_policy_a_correction_takes_the_place_of_the_ratio(preset: type[Objective]) -> None:
    found = sampled(preset().on_policy(False), by=OLDER)
    found.assert_near(replace(FORMULAS[preset], pull=truncated).expected(by=OLDER))
    assert found.points_elsewhere_than(TRUTH)


@pytest.mark.parametrize(
    ("correction", "weight"),
    [
        (rft.Truncated(1.2, level="product"), lambda ratios: ratios.whole.clamp(max=1.2)),
        (rft.Truncated(1.2, level="sequence"), lambda ratios: ratios.mean.clamp(max=1.2)),
        (rft.Truncated(1.2), lambda ratios: ratios.token.clamp(max=1.2)),
        (rft.Truncated(1e9), lambda ratios: ratios.token),  # of a token alone, leaves the prefixes to the older policy
        (rft.Masked(0.5, 2.0), lambda ratios: ratios.token * within(ratios.token, 0.5, 2.0)),
        (rft.Masked(0.5, 2.0, level="product"), lambda ratios: ratios.whole * within(ratios.whole, 0.5, 2.0)),
        (rft.Masked(0.9, 1.2, "sequence", weighted=False), lambda ratios: within(ratios.mean, 0.9, 1.2)),
    ],
    ids=["whole", "mean", "token", "token-unbounded", "band", "whole-band", "rejected"],
)
def test_the_bias_of_bounded_weights(correction: rft.Correction, weight: Callable[[Ratios], Tensor]) -> None:
    found = sampled(rft.RLOO(correction=correction), by=OLDER)
    found.assert_near(Formula(above_the_others, per_sample, lambda r, a: weight(r) * a).expected(by=OLDER))
    assert found.points_elsewhere_than(TRUTH)


def within(ratio: Tensor, low: float, high: float) -> Tensor:
    return ((ratio >= low) & (ratio <= high)).double()


@pytest.mark.parametrize("correction", [PRODUCT, None], ids=["corrected", "uncorrected"])
def test_a_proximal_policy_in_between(correction: rft.Correction | None) -> None:
    objective = Objective(rft.LeaveOneOut(), surrogate=rft.Plain(), correction=correction, **WHOLE)
    found = sampled(objective, by=OLDER if correction else BETWEEN, batches=40_000, proximal=BETWEEN)
    found.assert_near(TRUTH)


# Penalties


def total_divergence(policy: TablePolicy) -> Tensor:
    return (policy.chances * (policy.logprobs - REFERENCE.logprobs).sum(-1)).sum()


@pytest.mark.parametrize("preset", [rft.REINFORCE, rft.RLOO], ids=name)
def test_a_penalty_in_the_reward_is_part_of_what_is_maximised(preset: type[Objective]) -> None:
    found = sampled(replace(preset().on_policy(True), kl=rft.KL(0.2, "k1", "reward")), batches=40_000)
    exact = POLICY.gradient(lambda policy: mean_reward(policy) - 0.2 * total_divergence(policy))
    found.assert_near(exact)
    assert found.points_elsewhere_than(TRUTH)


def divergence(policy: TablePolicy, by: TablePolicy = POLICY, reverse: bool = False) -> Tensor:
    """The mean over answers of the divergence at each of their prefixes, which ``by`` chooses."""
    logprobs, reference = policy.logits.log_softmax(-1), REFERENCE.logits.log_softmax(-1)
    if reverse:
        logprobs, reference = reference, logprobs
    return by.visits @ (logprobs.exp() * (logprobs - reference)).sum(-1)


@pytest.mark.parametrize(
    ("estimator", "exact"),
    [
        ("k1", torch.zeros_like(TRUTH)),
        ("k2", POLICY.gradient(divergence)),
        ("k3", POLICY.gradient(lambda policy: divergence(policy, reverse=True))),
    ],
)
def test_the_gradient_of_each_estimator_in_the_loss(estimator: Any, exact: Tensor) -> None:
    objective = Objective(rft.Raw(), surrogate=rft.Likelihood(), correction=None, normalisation=1)
    found = sampled(replace(objective, kl=rft.KL(0.3, estimator)), samples=1, batches=40_000)
    found.assert_near(TRUTH - 0.3 * exact)


@pytest.mark.parametrize("correction", [None, rft.Truncated(1e9)], ids=["uncorrected", "corrected"])
def test_a_corrected_penalty_is_that_of_the_policy_in_training(correction: rft.Correction | None) -> None:
    # without an advantage, so that the penalty is alone
    objective = Objective(rft.Raw(), surrogate=rft.Plain(), correction=correction, normalisation=1)
    nothing = replace(objective, advantage=rft.GroupRelative())  # which for groups of one sample is zero
    exact = -0.3 * POLICY.gradient(lambda policy: divergence(policy, by=OLDER))
    sampled(replace(nothing, kl=rft.KL(0.3, corrected=True)), by=OLDER, samples=1, batches=40_000).assert_near(exact)
    uncorrected = sampled(replace(nothing, kl=rft.KL(0.3)), by=OLDER, samples=1)
    assert uncorrected.standard_errors_from(exact) > 3
