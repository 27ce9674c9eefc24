"""What is asked of TRL: its settings case by case, and the numbers that all cases share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LENGTHS = (6, 3, 1, 5, 4, 6, 2, 6)
TRUNCATED = (5,)  # samples without an end token
GROUP = 4
WIDTH = max(LENGTHS)
MAX_COMPLETION_LENGTH = 8  # not the longest completion: Dr. GRPO divides by the setting
REWARDS = (1.0, 0.0, 0.25, 0.5, -1.0, 2.0, 0.5, 0.0)
EQUAL_IN_ONE_GROUP = (0.7, 0.7, 0.7, 0.7, 1.0, 0.0, 0.0, 1.0)
UNSCORED = (1.0, None, 0.25, 0.5, -1.0, 2.0, 0.5, 0.0)
SAMPLED = ((1, 1, 0, 0, 1, 1), (1, 0, 1), (1,), (1, 1, 1, 1, 0), (1,) * 4, (1, 0, 0, 1, 1, 1), (1,) * 2, (1,) * 6)


@dataclass(frozen=True)
class Case:
    """One optimizer step of TRL.

    Args:
        settings: Arguments of ``GRPOConfig`` or ``RLOOConfig``.
        noise: Which of `inputs` it takes: ``"wide"`` or ``"narrow"``.
        trainer: ``"grpo"`` or ``"rloo"``.
        micro_batches: Micro-batches of the step, of equal numbers of samples.
        first_update: Whether the policy is still the one whose log-probs are ``old``, as in ours.
        from_engine: Whether log-probs of the engine are given, which TRL then corrects for (its ``use_vllm``).
        observations: Whether some tokens of a completion come from a tool.
        rewards: Of each sample.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    noise: str = "wide"
    trainer: str = "grpo"
    micro_batches: int = 1
    first_update: bool = False
    from_engine: bool = False
    observations: bool = False
    rewards: tuple[float | None, ...] = REWARDS


def inputs(noise: str) -> dict[str, Tensor]:
    """Log-probs [B, T] under ``policy``, ``old`` (before its last update), ``sampling`` (the engine) and ``reference``.

    The seed is one that puts ratios on both sides of every bound: with ``"wide"`` noise those of tokens and of whole
    samples, with ``"narrow"`` noise those of a sample's geometric mean.
    """
    generator = torch.Generator().manual_seed(163)
    shape = (len(LENGTHS), WIDTH)
    policy = -3 - 2 * torch.rand(shape, generator=generator)
    update, engine, drift = (torch.randn(shape, generator=generator) for _ in range(3))
    old = policy - {"wide": 0.35, "narrow": 0.05}[noise] * update
    return {
        "policy": policy,
        "old": old,
        "sampling": old + 0.7 * engine,
        "reference": policy + 0.3 * drift,
        "entropy": -policy / 2,
    }


def _cases() -> dict[str, Case]:
    sequence = {"importance_sampling_level": "sequence"}
    gspo = {"loss_type": "grpo", **sequence, "epsilon": 0.02, "epsilon_high": 0.03}
    luspo = {**gspo, "loss_type": "luspo"}
    cispo = {"loss_type": "cispo", "epsilon_high": 1.2}
    cases = {loss: Case({"loss_type": loss}) for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")}
    cases["cispo"] = Case(cispo)
    cases["luspo"] = Case(luspo, "narrow")
    cases["luspo, token"] = Case({"loss_type": "luspo"})
    cases["gspo"] = Case(gspo, "narrow")
    cases["dapo, sequence"] = Case({**gspo, "loss_type": "dapo"}, "narrow")
    cases["sapo, sequence"] = Case({"loss_type": "sapo", **sequence}, "narrow")
    cases["cispo, sequence"] = Case({**cispo, **sequence, "epsilon_high": 1.02}, "narrow")
    cases["rloo"] = Case(trainer="rloo")
    for name in list(cases):
        cases[f"{name}, two micro-batches"] = Case(**{**vars(cases[name]), "micro_batches": 2})

    for name in ("grpo", "gspo", "dapo", "cispo", "sapo", "vespo", "rloo"):
        cases[f"{name}, first update"] = Case(**{**vars(cases[name]), "first_update": True})
    cases["grpo, clip-higher"] = Case({"loss_type": "grpo", "epsilon_high": 0.28})
    cases["grpo, delta"] = Case({"loss_type": "grpo", "delta": 1.5})
    cases["dapo, delta"] = Case({"loss_type": "dapo", "delta": 1.5})
    cases["gspo, delta"] = Case({**gspo, "delta": 1.04}, "narrow")

    for name in ("grpo", "dapo", "gspo", "cispo", "sapo", "luspo"):
        case = cases[name]
        for corrected in (True, False):
            settings = {**case.settings, "beta": 0.1, "use_bias_correction_kl": corrected}
            cases[f"{name}, kl{' times ratio' if corrected else ''}"] = Case(settings, case.noise)
    cases["rloo, kl in reward"] = Case({"beta": 0.1}, trainer="rloo")

    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        correction = {"vllm_importance_sampling_mode": mode}
        band = {**correction, "vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 1.8}
        cases[f"grpo, {mode}"] = Case({"loss_type": "grpo", **correction}, from_engine=True)
        cases[f"grpo, {mode}, band"] = Case({"loss_type": "grpo", **band}, from_engine=True)
        cases[f"dapo, {mode}, first update"] = Case(
            {"loss_type": "dapo", **correction}, first_update=True, from_engine=True
        )
        gspo_bound = band if mode.endswith("mask") else correction
        cases[f"gspo, {mode}"] = Case({**gspo, **gspo_bound}, "narrow", from_engine=True)
        if mode.startswith("token"):
            cases[f"vespo, {mode}"] = Case({"loss_type": "vespo", **correction}, from_engine=True)
    unbounded = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1e6}
    cases["vespo, weights without a bound"] = Case({"loss_type": "vespo", **unbounded}, from_engine=True)
    mask = {"vllm_importance_sampling_mode": "token_mask"}
    cases["cispo, token_mask"] = Case({**cispo, **mask}, from_engine=True)
    cases["sapo, token_mask"] = Case({"loss_type": "sapo", **mask}, from_engine=True)
    cases["luspo, token_mask"] = Case({**luspo, **mask}, "narrow", from_engine=True)
    cases["grpo, token_mask, kl"] = Case({"loss_type": "grpo", "beta": 0.1, **mask}, from_engine=True)

    for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "luspo", "sapo", "vespo", "rloo"):
        masked = {**cases[name].settings, "mask_truncated_completions": True}
        cases[f"{name}, truncated masked"] = Case(masked, cases[name].noise, cases[name].trainer)

    for scale in ("group", "batch", "none"):
        cases[f"scale_rewards {scale}"] = Case({"loss_type": "dapo", "scale_rewards": scale})
        cases[f"scale_rewards {scale}, an equal group"] = Case(
            {"loss_type": "dapo", "scale_rewards": scale}, rewards=EQUAL_IN_ONE_GROUP
        )
    cases["one sample unscored"] = Case({"loss_type": "dapo"}, rewards=UNSCORED)
    cases["rloo, normalized advantages"] = Case({"normalize_advantages": True}, trainer="rloo")
    cases["rloo, an equal group"] = Case(trainer="rloo", rewards=EQUAL_IN_ONE_GROUP)

    cases["off-policy mask"] = Case({"loss_type": "grpo", "off_policy_mask_threshold": 0.05})
    cases["off-policy mask, token_mask"] = Case(
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.05, **mask}, from_engine=True
    )
    cases["entropy bonus"] = Case({"loss_type": "dapo", "entropy_coef": 0.01})
    cases["entropy bonus, grpo"] = Case({"loss_type": "grpo", "entropy_coef": 0.01})
    cases["top entropy tokens"] = Case({"loss_type": "dapo", "top_entropy_quantile": 0.5})
    cases["observations"] = Case({"loss_type": "grpo"}, observations=True)
    cases["gspo, observations"] = Case(gspo, "narrow", observations=True)
    return cases


CASES = _cases()
