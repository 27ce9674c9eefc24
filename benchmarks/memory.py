"""How much memory the output head takes in training, when its logits are made in chunks and when they are all held.

    python -m benchmarks.memory [--model runs/models/SmolLM2-135M-Instruct]

The most bytes that are allocated at a time during one forward and backward of the log-probs of 2,048 completion tokens
(8 rows of 256), in float32, above those of the same model with a constant loss on the hidden states instead of a head.
``peak_fraction_2048`` is that of chunks over that of a log-softmax over all logits. Counted from the allocator's own
events, as the profiler records them, so that it does not depend on when an allocator gives pages back.
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

from benchmarks.packing import group
from lightning_rft.trainer.linear_logprobs import LogitTransform
from lightning_rft.trainer.logprobs import kept_logits, replaced_head, token_logprobs
from lightning_rft.trainer.packing import Packed, pack

RESULTS = Path(__file__).parent / "results"
PROMPT, COMPLETION, SAMPLES = 16, 256, 8


def peak(model: Any, loss: Callable[[], Tensor]) -> int:
    """The most bytes at a time, above those at the begin."""
    model.zero_grad(set_to_none=True)
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
    with replaced_head(model.get_output_embeddings(), lambda hidden: hidden):
        return kept_logits(model, packed).sum()


def naive(model: Any, packed: Packed) -> Tensor:
    """Log-softmax over the logits of all tokens."""
    logits = kept_logits(model, packed)[packed.row, packed.column]
    return logits.log_softmax(-1).gather(-1, packed.target[:, None]).sum()


def chunked(model: Any, packed: Packed) -> Tensor:
    """As in the trainer."""
    return token_logprobs(model, packed, chunked_head=LogitTransform())[0].sum()


def main() -> None:
    """Measures and writes."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="runs/models/SmolLM2-135M-Instruct")
    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(parser.parse_args().model, dtype=torch.float32)
    model.train()
    packed = pack([group(PROMPT, COMPLETION, SAMPLES)], shared=False)
    tokens = len(packed.target)
    print(f"{tokens} completion tokens, float32\n{'':10} MB at most  MB for the head")
    peaks = {loss.__name__: peak(model, functools.partial(loss, model, packed)) for loss in (constant, naive, chunked)}
    for name, most in peaks.items():
        print(f"{name:10} {most / 1e6:10.0f} {(most - peaks['constant']) / 1e6:16.0f}", flush=True)
    results = {f"{name}_mb": round(most / 1e6, 1) for name, most in peaks.items()}
    head = peaks["chunked"] - peaks["constant"], peaks["naive"] - peaks["constant"]
    results[f"peak_fraction_{tokens}"] = round(head[0] / head[1], 4)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
