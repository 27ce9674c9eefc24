"""The memory of training: that of the output head, and that of a micro-batch beyond weights, gradients and optimizer.

    python -m benchmarks.memory [--model runs/models/SmolLM2-135M-Instruct]

The head, when its logits are made in chunks and when they are all held: the most bytes that are allocated at a time
during one forward and backward of the log-probs of 2,048 completion tokens (8 rows of 256), in float32, above those of
the same model with a constant loss on the hidden states instead of a head. ``peak_fraction_2048`` is that of chunks
over that of a log-softmax over all logits. Counted from the allocator's own events, as the profiler records them, so
that it does not depend on when an allocator gives pages back.

A micro-batch of a small wide model with gradient checkpointing: a group of 16 samples of 4,096 tokens, whole and cut as
``RFTModule(max_tokens_per_micro_batch=...)`` cuts it, over one sample alone (``cut_over_one``). These are counted on
tensors without contents; that this is what the allocator sees, and what the formula of ``benchmarks.activations`` says,
is measured with one sample of half and of the whole length (``formula_over_measured``).
Writes ``benchmarks/results/memory.json``.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.activations import counted, predicted
from benchmarks.packing import group
from lightning_rft.experience import Turn
from lightning_rft.trainer.linear_logprobs import LogitTransform
from lightning_rft.trainer.logprobs import kept_logits, replaced_forward, token_logprobs
from lightning_rft.trainer.micro_batches import by_group, micro_batches
from lightning_rft.trainer.packing import Packed, pack
from lightning_rft.trainer.shortcuts import FastPath
from lightning_rft.trainer.weighted import WeightedTurn

RESULTS = Path(__file__).parent / "results"
PROMPT, COMPLETION, SAMPLES = 16, 256, 8
WIDE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512,
}  # fmt: skip
GROUP = 16
SPLITS = (1024, 3072), (3584, 512)  # prompt and completion
BUDGET = 4096


def peak(loss: Callable[[], Tensor]) -> int:
    """The most bytes at a time, above those at the begin."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss().backward()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def constant(model: Any, packed: Packed) -> Tensor:
    """A loss that needs no head."""
    with replaced_forward(model.get_output_embeddings(), lambda hidden: hidden):
        return kept_logits(model, packed).sum()


def naive(model: Any, packed: Packed) -> Tensor:
    """Log-softmax over the logits of all tokens."""
    logits = kept_logits(model, packed)[packed.row, packed.column]
    return logits.log_softmax(-1).gather(-1, packed.target[:, None]).sum()


def chunked(model: Any, packed: Packed) -> Tensor:
    """As in the trainer."""
    return token_logprobs(model, packed, chunked_head=LogitTransform())[0].sum()


def small_ids(prompt: int, completion: int, samples: int) -> list[Turn]:
    """A group for a small vocabulary."""
    nothing = (0,) * completion
    return [Turn((5,) * prompt, (sample,) * completion, nothing, nothing, "length") for sample in range(samples)]


def head(path: str) -> dict[str, float]:
    """Peaks with each kind of head."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.train()
    packed = pack([group(PROMPT, COMPLETION, SAMPLES)], shared=False)
    tokens = len(packed.target)
    print(f"{tokens} completion tokens, float32\n{'':10} MB at most  MB for the head")
    peaks: dict[str, int] = {}
    for loss in (constant, naive, chunked):
        model.zero_grad(set_to_none=True)
        peaks[loss.__name__] = peak(functools.partial(loss, model, packed))
    above = {name: most - peaks["constant"] for name, most in peaks.items()}
    for name, most in peaks.items():
        print(f"{name:10} {most / 1e6:10.0f} {above[name] / 1e6:16.0f}", flush=True)
    results = {f"{name}_mb": round(most / 1e6, 1) for name, most in peaks.items()}
    return results | {f"peak_fraction_{tokens}": round(above["chunked"] / above["naive"], 4)}


def micro_batch_peaks(config: Any) -> dict[str, float]:
    """A group, whole and cut, over one of its samples."""
    results: dict[str, float] = {}
    print(f"\na group of {GROUP}, over one sample alone\nprompt completion  one: MB  ordinary  shared  cut")
    for prompt, completion in SPLITS:
        turns = small_ids(prompt, completion, GROUP)
        path = FastPath(LogitTransform(), True, 5.0 * config.hidden_size, torch.float32, 1)
        weighted = [WeightedTurn(turn, 0, sample, turn.num_tokens) for sample, turn in enumerate(turns)]
        (pieces,) = micro_batches(weighted, 1, max_tokens=BUDGET, columns=path.columns, shared=True)
        layouts = {
            "one": [pack([turns[:1]], shared=False)],
            "ordinary": [pack([turns], shared=False)],
            "shared": [path.pack([turns])],
            "cut": [path.pack(by_group(piece)) for piece in pieces],
        }
        most = {
            name: max(counted(config, packed, precision="32-true", checkpointing=True) for packed in layout)
            for name, layout in layouts.items()
        }
        ratios = {name: round(most[name] / most["one"], 3) for name in ("ordinary", "shared", "cut")}
        print(f"{prompt:6} {completion:10} {most['one'] / 1e6:8.0f}  {ratios}", flush=True)
        results |= {f"{name}_over_one_{prompt}_{completion}": ratio for name, ratio in ratios.items()}
    return results


def formula(config: Any) -> dict[str, float]:
    """Count and formula over what is measured, for one sample of two lengths."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    results: dict[str, float] = {}
    print("\ncolumns  measured MB  counted  formula")
    for prompt, completion in ((512, 1536), SPLITS[0]):
        packed = pack([small_ids(prompt, completion, 1)], shared=False)
        columns = packed.input_ids.numel()
        most = peak(functools.partial(chunked, model, packed))
        count = counted(config, packed, precision="32-true", checkpointing=True)
        says = predicted(config, columns, completion, precision="32-true", checkpointing=True)
        print(f"{columns:7} {most / 1e6:12.0f} {count / most:8.3f} {says / most:8.3f}", flush=True)
        results |= {
            f"counted_over_measured_{columns}": round(count / most, 3),
            f"formula_over_measured_{columns}": round(says / most, 3),
        }
    return results


def main() -> None:
    """Measures and writes."""
    from transformers import LlamaConfig
    from transformers.utils.logging import disable_progress_bar

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="runs/models/SmolLM2-135M-Instruct")
    disable_progress_bar()
    config = LlamaConfig(**WIDE, max_position_embeddings=8192)
    results = head(parser.parse_args().model) | micro_batch_peaks(config) | formula(config)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
