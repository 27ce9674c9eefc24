"""Losses and gradients against TRL's, on the same numbers: docs/objectives.md has the table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.trainer.objectives.advantages import GroupRelative
from lightning_rft.trainer.objectives.corrections import Correction, Masked, Truncated
from lightning_rft.trainer.objectives.grpo import CISPO, DAPO, GRPO, GSPO, SAPO, VESPO, DrGRPO
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.objectives.penalties import KL
from lightning_rft.trainer.objectives.reinforce import RLOO
from lightning_rft.trainer.objectives.surrogates import Clip, StopGradient
from lightning_rft.trainer.weighted import WeightedTurn, sampled_turns, token_batch, weighted_turns
from tests.trainer.trl_parity import cases, recorder
from tests.trainer.trl_parity.cases import CASES, LENGTHS, MAX_COMPLETION_LENGTH, SAMPLED, TRUNCATED, Case

RECORD = json.loads(recorder.RECORD.read_text(encoding="utf-8"))
PRESETS = {
    "grpo": GRPO(),
    "bnpo": DAPO(),
    "dr_grpo": DrGRPO(),
    "dapo": DAPO(),
    "cispo": CISPO(),
    "sapo": SAPO(),
    "luspo": GSPO(normalisation=1),
    "vespo": VESPO(),
    "rloo": RLOO(),
}

# What comes out otherwise, as a test for each shows.
SHARED_RATIO = [
    "gspo, token_truncate",
    "gspo, token_mask",
    "luspo, token_mask",
    "gspo, kl times ratio",
    "luspo, kl times ratio",
]
DIFFERENT = {
    *SHARED_RATIO,
    "bnpo, two micro-batches",
    "rloo, truncated masked",
    "entropy bonus, grpo",
    "one sample unscored",
    "grpo, token_mask, kl",
}
# What only TRL has.
NOT_HERE = {
    "vespo, token_truncate",
    "vespo, token_mask",
    "off-policy mask",
    "off-policy mask, token_mask",
    "top entropy tokens",
    "rloo, normalized advantages",
}


def objective(case: Case) -> Objective:
    """What we call TRL's settings."""
    get = case.settings.get
    loss = "rloo" if case.trainer == "rloo" else get("loss_type")
    preset = PRESETS[loss]
    low = get("epsilon", 0.2)
    high = get("epsilon_high", low)
    scale = get("scale_rewards", "group")
    if isinstance(preset.surrogate, Clip):
        preset = replace(preset, surrogate=Clip(low, high, dual=get("delta")))
    elif isinstance(preset.surrogate, StopGradient):
        preset = replace(preset, surrogate=StopGradient(positive=(0.0, high), negative=(0.0, high)))
    if loss != "rloo":
        preset = replace(preset, advantage=GroupRelative(scale=None if scale == "none" else scale))
    if preset.ratio != "product":
        preset = replace(preset, ratio=get("importance_sampling_level", "token"))
    return replace(
        preset,
        correction=correction(case),
        mask_truncated=get("mask_truncated_completions", False),
        kl=penalty(case),
        entropy=get("entropy_coef", 0.0),
    )


def correction(case: Case) -> Correction | None:
    if not case.from_engine or case.settings["loss_type"] == "vespo":
        return None
    level, kind = case.settings["vllm_importance_sampling_mode"].split("_")
    level = {"token": "token", "sequence": "product"}[level]
    high = case.settings.get("vllm_importance_sampling_clip_max", 3.0)
    low = case.settings.get("vllm_importance_sampling_clip_min", 0.0)
    return Truncated(high, level, low) if kind == "truncate" else Masked(low, high, level)


def penalty(case: Case) -> KL | None:
    if "beta" not in case.settings:
        return None
    if case.trainer == "rloo":
        return KL(case.settings["beta"], "k1", where="reward")
    return KL(case.settings["beta"], corrected=case.settings.get("use_bias_correction_kl", True))


class Step:
    """One optimizer step of ours on a case's numbers."""

    def __init__(self, name: str) -> None:
        self.case = CASES[name]
        recorded = RECORD["inputs"][self.case.noise]
        self.given = {key: torch.tensor(values) for key, values in recorded.items()}
        self.policy = self.given["policy"].clone().requires_grad_()
        self.entropy = self.given["entropy"].clone().requires_grad_()
        if self.case.first_update:
            self.given["old"] = self.given["policy"]
        self.place: dict[int, tuple[int, slice]] = {}  # of each turn's tokens, by its identity

    def groups(self, samples: Iterable[int] = range(len(LENGTHS))) -> list[Group]:
        """The batch as explorers would have sent it."""
        experiences = [(sample // cases.GROUP, self._experience(sample)) for sample in samples]
        return [
            Group(GroupKey(0, index), str(index), tuple(experience for _, experience in members))
            for index, members in groupby(experiences, key=lambda pair: pair[0])
        ]

    def _experience(self, sample: int) -> Experience:
        mask = SAMPLED[sample] if self.case.observations else (1,) * LENGTHS[sample]
        logprobs = self.given["sampling" if self.case.from_engine else "old"][sample]
        turns, begin = [], 0
        for sampled, stretch in groupby(mask):
            end = begin + len(list(stretch))
            if sampled:
                ids, count = range(100, 101 + begin), end - begin
                reason = "length" if sample in TRUNCATED else "stop"
                turns.append(Turn(ids, [7] * count, logprobs[begin:end].tolist(), [0] * count, reason))
                self.place[id(turns[-1])] = sample, slice(begin, end)
            begin = end
        return Experience(str(sample), sample, tuple(turns), float(self.case.rewards[sample] or 0.0))

    def of_turns(self, values: Tensor, turns: Iterable[Turn]) -> list[Tensor]:
        return [values[self.place[id(turn)]] for turn in turns]

    def turns(self, groups: list[Group], chosen: Objective) -> list[WeightedTurn]:
        reference = None
        if chosen.needs_reference:
            sampled = [weighted.turn for weighted in sampled_turns(groups)]
            reference = [np.asarray(part) for part in self.of_turns(self.given["reference"], sampled)]
        return weighted_turns(groups, chosen, max_new_tokens=MAX_COMPLETION_LENGTH, reference=reference)

    def run(self, groups: list[Group] | None = None, cut: list[list[int]] | None = None) -> dict[str, Tensor]:
        """Loss and gradients [B, T], after as many micro-batches of samples as TRL had, or those given."""
        chosen = objective(self.case)
        turns = self.turns(self.groups() if groups is None else groups, chosen)
        loss = torch.zeros(())
        for samples in cut or [list(range(len(LENGTHS)))]:
            part = [turn for turn in turns if turn.sample in samples]
            raw = [turn.turn for turn in part]
            logprobs, entropy = (torch.cat(self.of_turns(values, raw)) for values in (self.policy, self.entropy))
            tokens, weights = token_batch(part, logprobs, entropy)
            if chosen.correction is not None and not self.case.first_update:
                tokens = replace(tokens, proximal_logprobs=torch.cat(self.of_turns(self.given["old"], raw)))
            micro_loss = (weights * chosen.token_loss(tokens)[0]).sum()
            micro_loss.backward()
            loss += micro_loss.detach()
        assert self.policy.grad is not None
        result = {"loss": loss, "gradient": self.policy.grad}
        return result if self.entropy.grad is None else {**result, "entropy_gradient": self.entropy.grad}


def theirs(name: str) -> dict[str, Any]:
    return {key: torch.tensor(value) for key, value in RECORD["cases"][name].items() if key != "micro_batches"}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], *, factor: float = 1.0) -> None:
    # A loss near 0 is a sum of larger numbers.
    for name, smallest in {"loss": 1e-7, "gradient": 1e-8, "entropy_gradient": 1e-8}.items():
        if name in ours:
            assert ours[name].dtype == torch.float32
            torch.testing.assert_close(ours[name], factor * expected[name], rtol=1e-5, atol=smallest)


def assert_different(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_same(ours, expected)


def cut(name: str) -> list[list[int]] | None:
    return RECORD["cases"][name].get("micro_batches")


@pytest.mark.parametrize("name", [name for name in CASES if name not in DIFFERENT | NOT_HERE])
def test_same_loss_and_gradient(name):
    assert_same(Step(name).run(cut=cut(name)), theirs(name))


@pytest.mark.parametrize("name", ["grpo", "gspo", "dapo", "luspo", "rloo", "grpo, delta"])
def test_ratios_lie_on_both_sides_of_every_bound(name):
    low, high = theirs(name)["clipped_low"], theirs(name)["clipped_high"]
    assert low > 0 and high > 0 and low + high < 1
    assert_different(theirs("grpo, delta"), theirs("grpo"))


def test_the_mean_over_a_micro_batch_depends_on_the_cut_and_ours_does_not():
    name = "bnpo, two micro-batches"
    assert_same(Step(name).run(cut=cut(name)), theirs("bnpo"))
    assert_different(theirs(name), theirs("bnpo"))


def test_a_masked_sample_leaves_a_constant_in_their_rloo():
    ours, expected = Step("rloo, truncated masked").run(), theirs("rloo, truncated masked")
    constant = -expected["advantages"][list(TRUNCATED)].sum() / len(LENGTHS)
    assert_same({**ours, "loss": ours["loss"] + constant}, expected)


@pytest.mark.parametrize("name", SHARED_RATIO)
def test_what_differs_within_a_sample_keeps_to_its_token_under_a_ratio_of_the_sample(name):
    ours, expected = Step(name).run(), theirs(name)
    assert_different(ours, expected)
    assert_same(*({**step, "gradient": step["gradient"].sum(1)} for step in (ours, expected)))


def test_a_penalty_times_ratio_is_corrected_for_the_engine_too():
    ours, expected, without = Step("grpo, token_mask, kl"), theirs("grpo, token_mask, kl"), theirs("grpo, token_mask")
    log_weight = ours.given["old"] - ours.given["sampling"]
    weight = log_weight.exp().masked_fill(log_weight.exp() > 3.0, 0.0)
    of_ours, of_theirs = (step["gradient"] - without["gradient"] for step in (ours.run(), expected))
    torch.testing.assert_close(of_ours, weight * of_theirs, rtol=1e-4, atol=1e-7)


def test_the_entropy_bonus_is_normalised_as_the_loss_is():
    ours, expected = Step("entropy bonus, grpo").run(), theirs("entropy bonus, grpo")
    assert_same({"gradient": ours["gradient"]}, expected)
    assert_different(ours, expected)
    of_samples = ours["entropy_gradient"].sum(1)
    torch.testing.assert_close(of_samples, torch.full_like(of_samples, -0.01 / len(LENGTHS)))
    torch.testing.assert_close(expected["entropy_gradient"].sum(), torch.tensor(-0.01))


def test_an_unscored_sample_does_not_reach_the_trainer():
    step = Step("one sample unscored")
    scored = [sample for sample, reward in enumerate(step.case.rewards) if reward is not None]
    ours = step.run(step.groups(scored))
    assert_same(ours, theirs("one sample unscored"), factor=sum(LENGTHS) / sum(LENGTHS[sample] for sample in scored))


@pytest.mark.filterwarnings("ignore")
def test_the_record_is_what_the_installed_trl_does():
    pytest.importorskip("trl")
    made = recorder.record()
    assert list(made["cases"]) == list(RECORD["cases"])
    for name, case in made["cases"].items():
        again = {key: torch.tensor(value) for key, value in case.items() if key != "micro_batches"}
        assert_same(again, theirs(name))
        torch.testing.assert_close(again["advantages"], theirs(name)["advantages"])
