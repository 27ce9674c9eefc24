"""Objectives as their callers see them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jsonargparse
import pytest
import torch

import lightning_rft as rft
from lightning_rft.errors import ConfigurationError
from lightning_rft.trainer.objectives.corrections import Truncated
from lightning_rft.trainer.objectives.normalisation import token_weights
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.objectives.tokens import TokenBatch

PRESETS: list[type[Objective]] = [
    rft.GRPO,
    rft.DrGRPO,
    rft.DAPO,
    rft.GSPO,
    rft.CISPO,
    rft.RLOO,
    rft.REINFORCE,
    rft.REINFORCEPlusPlus,
    rft.SAPO,
    rft.OPMD,
    rft.AsymRE,
    rft.TOPR,
    rft.VESPO,
]


def tokens_of(logprobs: torch.Tensor, sampling: torch.Tensor, advantages: torch.Tensor, **others: Any) -> TokenBatch:
    """Tokens of samples of one token each."""
    each = torch.arange(len(logprobs))
    return TokenBatch(logprobs, sampling, advantages, each, torch.ones_like(each), **others)


def test_token_loss_by_hand() -> None:
    sampling = torch.log(torch.tensor([0.4, 0.4, 0.4, 0.4]))
    logprobs = torch.log(torch.tensor([0.4, 0.6, 0.2, 0.6])).requires_grad_()
    tokens = tokens_of(logprobs, sampling, torch.tensor([2.0, 2.0, -1.0, -1.0]))
    loss, statistics = rft.GRPO(surrogate=rft.Clip(high=0.3), correction=None).token_loss(tokens)
    torch.testing.assert_close(loss, torch.tensor([-2.0, -2.6, 0.8, 1.5]))
    assert statistics["clip_fraction"].tolist() == [0.0, 1.0, 1.0, 0.0]
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5])
    torch.testing.assert_close(statistics["kl"], ratio - 1 - ratio.log())
    assert not any(value.requires_grad for value in statistics.values())
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.0, 0.0, 0.0, 1.5]))


def test_a_correction_takes_the_place_of_the_ratio() -> None:
    sampling = torch.log(torch.tensor([0.4, 0.4, 0.1]))
    logprobs = torch.log(torch.tensor([0.4, 0.2, 0.8])).requires_grad_()
    tokens = tokens_of(logprobs, sampling, torch.ones(3))
    loss, statistics = rft.GRPO(correction=Truncated(3.0)).token_loss(tokens)
    torch.testing.assert_close(statistics["correction"], torch.tensor([1.0, 0.5, 3.0]))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -torch.tensor([1.0, 0.5, 3.0]))  # nothing is clipped


def test_the_correction_follows_from_the_strategy() -> None:
    assert rft.GRPO().on_policy(True).correction is None
    assert rft.GRPO().on_policy(False).correction == Truncated()
    chosen = rft.GRPO(correction=rft.Masked())
    assert chosen.on_policy(True) == chosen.on_policy(False) == chosen
    assert rft.TOPR().on_policy(False).correction is None


def test_terms_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    tokens = tokens_of(
        logprobs,
        logprobs.detach(),
        torch.zeros(2),
        entropy=torch.tensor([1.0, 3.0]),
        reference_logprobs=torch.tensor([-1.5, -2.0]),
    )
    loss, statistics = rft.GRPO(kl=rft.KL(0.1, "k1"), entropy=0.01).token_loss(tokens)
    torch.testing.assert_close(loss, torch.tensor([0.05 - 0.01, -0.03]))
    torch.testing.assert_close(statistics["reference_kl"], torch.tensor([0.5, 0.0]))
    loss, _ = rft.RLOO(kl=rft.KL(0.1, "k1", "reward")).token_loss(tokens)
    assert loss.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("correction", [None, Truncated(9.0)])
def test_a_corrected_penalty_is_times_the_ratio_with_a_correction_too(correction: Truncated | None) -> None:
    logprobs, sampling = torch.log(torch.tensor([0.2, 0.4])), torch.log(torch.tensor([0.4, 0.1]))
    tokens = tokens_of(logprobs, sampling, torch.zeros(2), reference_logprobs=logprobs - 1)
    loss, _ = rft.GRPO(correction=correction, kl=rft.KL(0.1, "k1", corrected=True)).token_loss(tokens)
    torch.testing.assert_close(loss, 0.1 * torch.tensor([0.5, 4.0]))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_promises_hold(preset: type[Objective]) -> None:
    objective = preset()
    logprobs = torch.tensor([-1.0, -9.0], requires_grad=True)
    loss, _ = objective.token_loss(tokens_of(logprobs, torch.tensor([-3.0, -1.0]), torch.zeros(2)))
    loss.sum().backward()
    assert logprobs.grad is not None
    assert bool(logprobs.grad.any()) is not objective.skips_zero_advantage
    for other in (dataclasses.replace(objective, entropy=0.1), dataclasses.replace(objective, kl=rft.KL(0.1))):
        assert not other.skips_zero_advantage
    alone = objective.advantage(torch.tensor([3.0], dtype=torch.float64), torch.tensor([0]))
    assert objective.needs_group or preset in (rft.REINFORCE, rft.REINFORCEPlusPlus)
    if objective.needs_group:
        assert float(alone) == getattr(objective.advantage, "shift", 0.0)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_presets_are_settings_and_name_their_paper(preset: type[Objective]) -> None:
    assert preset.__doc__ is not None and "https://" in preset.__doc__ and "``" in preset.__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset().entropy = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"normalisation": 0}, "normalisation"),
        ({"entropy": -1.0}, "entropy"),
        ({"clip_high": 0.28}, r"clip_high moved: set surrogate=Clip\(high=...\)"),
        ({"clip_low": 0.1}, r"clip_low moved: set surrogate=Clip\(low=...\)"),
        ({"scale_rewards": False}, r"scale_rewards moved: set advantage=GroupRelative\(scale=...\)"),
    ],
)
def test_what_is_wrong_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        rft.GRPO(**settings)


def test_objectives_can_be_named_in_a_config() -> None:
    assert rft.Clip and rft.DAPO and rft.LeaveOneOut  # a short name is found once it is imported
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)

    def built(*arguments: str) -> Any:
        return parser.instantiate(parser.parse_args(list(arguments))).objective

    chosen = built("--objective=DAPO", "--objective.surrogate=Clip", "--objective.surrogate.high=0.3")
    assert chosen == rft.DAPO(surrogate=rft.Clip(high=0.3))
    settings = ["--objective.normalisation=constant", "--objective.correction=null", "--objective.kl.coefficient=0.1"]
    composed = built("--objective=Objective", "--objective.advantage=LeaveOneOut", *settings)
    assert composed == Objective(rft.LeaveOneOut(), normalisation="constant", correction=None, kl=rft.KL(0.1))


def test_a_custom_objective_is_a_small_subclass() -> None:
    @dataclasses.dataclass(frozen=True)
    class Pessimist(rft.GRPO):
        def token_loss(self, tokens: TokenBatch) -> Any:
            loss, statistics = super().token_loss(tokens)
            return loss.clamp(min=0), statistics

    loss, _ = Pessimist().token_loss(tokens_of(torch.tensor([-2.0]), torch.tensor([-2.0]), torch.tensor([3.0])))
    assert loss.item() == 0.0


# Normalisation


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("token", [1 / 8, 1 / 8, 1 / 8]),
        ("sequence", [1 / 3, 1 / 9, 1 / 12]),
        ("group", [1 / 8, 1 / 8, 1 / 8]),
        ("constant", [1 / 48, 1 / 48, 1 / 48]),
        (1, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_weights_by_hand(by: Any, expected: list[float]) -> None:
    lengths, groups = torch.tensor([1, 3, 4]), torch.tensor([0, 0, 1])
    assert token_weights(lengths, groups, by, max_new_tokens=16).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("by", ["token", "sequence", "group", "constant", 3])
def test_weights_of_nothing_are_finite(by: Any) -> None:
    for lengths in (torch.tensor([0, 0]), torch.tensor([], dtype=torch.long)):
        weights = token_weights(lengths, torch.zeros_like(lengths), by, max_new_tokens=16)
        assert weights.isfinite().all() and len(weights) == len(lengths)
