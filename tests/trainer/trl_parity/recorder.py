"""Runs TRL's own trainers on plain numbers, and writes what they make of them.

    python -m tests.trainer.trl_parity.recorder

TRL generates, scores, shuffles, cuts and takes its loss as in training; only what a model would say is given: the
completions, and their log-probs, which are a leaf of the graph.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.trainer.trl_parity.cases import (
    CASES,
    GROUP,
    LENGTHS,
    MAX_COMPLETION_LENGTH,
    SAMPLED,
    TRUNCATED,
    Case,
    inputs,
)

RECORD = Path(__file__).with_name("record.json")
END, FIRST_NAME = 1, 10
CLIPPED = {
    "clipped_low": "clip_ratio/low_mean",
    "clipped_high": "clip_ratio/high_mean",
    "clipped": "cispo_clip_ratio",
}


def _trainer(case: Case, folder: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    words = {"<pad>": 0, "<eos>": END, **{str(i): i for i in range(2, 50)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            pad_token_id=0,
            eos_token_id=END,
            bos_token_id=None,
        )
    )
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[case.trainer]
    # A reference model would be loaded by its name.
    settings = {name: value for name, value in case.settings.items() if name != "beta"}
    made = trainer(
        model=model,
        reward_funcs=lambda completions, **_: list(case.rewards),
        args=config(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_strategy="no",
            per_device_train_batch_size=len(LENGTHS) // case.micro_batches,
            gradient_accumulation_steps=case.micro_batches,
            num_generations=GROUP,
            max_completion_length=MAX_COMPLETION_LENGTH,
            num_iterations=1 if case.first_update else 2,  # with 2, `old` log-probs are kept
            beta=0.0,
            **settings,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": ["2"] * len(LENGTHS)}),
    )
    made.beta = case.settings.get("beta", 0.0)
    made.ref_model = object()
    made.use_vllm = case.from_engine
    made.current_gradient_accumulation_steps = case.micro_batches
    return made


def run(case: Case, folder: str) -> dict[str, Any]:
    """One optimizer step: its loss, its gradient by log-prob [B, T], and what led to it."""
    with patch.dict(os.environ, CI="1"):  # no telemetry
        trainer = _trainer(case, folder)
    given = inputs(case.noise)
    if case.first_update:
        given["old"] = given["policy"]
    policy = given["policy"].clone().requires_grad_()
    entropies = given["entropy"].clone().requires_grad_()
    micro_batches: list[list[int]] = []
    seen: dict[str, list[float]] = {}

    def generate(self: Any, prompts: list[str]) -> tuple[Any, ...]:
        names = [[FIRST_NAME + i] for i in range(len(prompts))]
        completions = [
            [2] * length if i in TRUNCATED else [2] * (length - 1) + [END] for i, length in enumerate(LENGTHS)
        ]
        if case.trainer == "rloo":
            return names, completions, ["" for _ in prompts]
        logprobs = [given["sampling"][i, :length].tolist() for i, length in enumerate(LENGTHS)]
        tools = [list(mask) for mask in SAMPLED] if case.observations else None
        return (
            names,
            completions,
            tools,
            ["" for _ in prompts],
            logprobs if case.from_engine else None,
            {},
            None,
            [],
        )

    def logprobs(self: Any, model: Any, input_ids: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        rows = input_ids[:, 0] - FIRST_NAME
        if torch.is_grad_enabled():
            micro_batches.append(rows.tolist())
            return policy[rows], entropies[rows], None
        return given["reference" if model is self.ref_model else "old"][rows], None, None

    scored = trainer._generate_and_score_completions

    def score(self: Any, batch: Any) -> Any:
        output = scored(batch)
        seen["advantages"] = _plain(output["advantages"])
        return output

    trainer._generate = MethodType(generate, trainer)
    trainer._get_per_token_logps_and_entropies = MethodType(logprobs, trainer)
    trainer._generate_and_score_completions = MethodType(score, trainer)
    torch.manual_seed(3)  # TRL shuffles the batch before it cuts it
    prompts = [{"prompt": "2"} for _ in LENGTHS]
    losses = [trainer.training_step(trainer.model, prompts, None) for _ in range(case.micro_batches)]
    assert policy.grad is not None
    result: dict[str, Any] = {
        "loss": _plain(torch.stack(losses).sum()),
        "gradient": _plain(policy.grad),
        "advantages": seen["advantages"],
    }
    if case.micro_batches > 1:
        result["micro_batches"] = micro_batches
    if entropies.grad is not None and entropies.grad.any():
        result["entropy_gradient"] = _plain(entropies.grad)
    for name, key in CLIPPED.items():
        if values := trainer._metrics["train"].get(key):
            result[name] = round(sum(values) / len(values), 3)
    return result


def _plain(tensor: Tensor) -> Any:
    """As nested lists of the shortest numbers that are read back as the same float32."""
    assert tensor.dtype == torch.float32
    if tensor.dim():
        return [_plain(part) for part in tensor]
    return float(str(tensor.detach().numpy()[()]))


def record() -> dict[str, Any]:
    import trl

    with tempfile.TemporaryDirectory() as folder:
        cases = {name: run(case, folder) for name, case in CASES.items()}
    numbers = {noise: inputs(noise) for noise in ("wide", "narrow")}
    return {
        "trl": trl.__version__,
        "inputs": {noise: {name: _plain(value) for name, value in given.items()} for noise, given in numbers.items()},
        "cases": cases,
    }


if __name__ == "__main__":
    made = record()
    cases = made.pop("cases")
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in made.items()]
    steps = ",\n".join(f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    RECORD.write_text("{" + ",\n".join(lines) + ',\n"cases": {\n' + steps + "\n}}\n", encoding="utf-8")
