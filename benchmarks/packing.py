"""How much sooner a group is trained when its samples share rows than when each has a row of its own.

    python -m benchmarks.packing [--model runs/models/SmolLM2-135M-Instruct]

Processor seconds, on one thread, of forward and backward of the log-probs, ordinary rows' over shared rows', for
prompts and completions of several lengths and groups of several sizes. All take turns, and each number is the ratio of
medians. ``ratio_45_20_8`` is that of 45 tokens of prompt, 20 of completion and 8 samples, in 4 groups; ``worst_ratio``
the least of all. Both have their logits made in chunks, of completion tokens alone; ``plain_ratio_45_20_8`` compares
with ordinary rows and the logits of all tokens at once, which is what a trainer does that takes no care. Where sharing
does not pay, the trainer keeps ordinary rows, and the ratio is 1 without being measured.
``turns_4``, ``turns_10`` and ``turns_20`` are counts: the columns that are trained for an agent of so many turns, each
of whose prompts extends the last, over those of the last turn alone. A row per turn would make them 4, 10 and 20.
In bfloat16 where the machine multiplies that fast, in float32 elsewhere. Writes ``benchmarks/results/packing.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rft.experience import Turn
from lightning_rft.hardware import fast_precision
from lightning_rft.trainer.linear_logprobs import LogitTransform
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.packing import Packed, pack
from lightning_rft.trainer.shortcuts import probe

RESULTS = Path(__file__).parent / "results"
KEY = 45, 20, 8
# Prompt, completion, samples: from all prompt to all completion.
GRID = [KEY, (200, 20, 2), (200, 20, 8), (45, 20, 2), (45, 45, 4), (64, 128, 4), (20, 160, 8), (5, 320, 2), (5, 320, 4)]
REPEATS = 3
TURNS = 4, 10, 20


def group(prompt: int, completion: int, samples: int, seed: int = 0) -> list[Turn]:
    """Random tokens."""
    ids = torch.randint(100, 40_000, (prompt + samples * completion,), generator=torch.Generator().manual_seed(seed))
    nothing = (0,) * completion
    completions = ids[prompt:].view(samples, completion).tolist()
    return [Turn(ids[:prompt].tolist(), tokens, nothing, nothing, "length") for tokens in completions]


def conversation(turns: int, prompt: int = 200, sampled: int = 80, observed: int = 120) -> list[Turn]:
    """Calls whose prompts each extend the last prompt and answer by what was observed, random tokens."""
    random = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(100, 40_000, (count,), generator=random).tolist()

    text, made, nothing = some(prompt), [], (0,) * sampled
    for _ in range(turns):
        made.append(Turn(text, some(sampled), nothing, nothing, "stop"))
        text = [*text, *made[-1].token_ids.tolist(), *some(observed)]
    return made


def columns_of_turns() -> dict[str, float]:
    """Columns trained for conversations over those of their last turns."""
    ratios = {}
    for turns in TURNS:
        calls = conversation(turns)
        whole, last = pack([calls], shared=False), pack([calls[-1:]], shared=False)
        assert whole.target.tolist() == [token for call in calls for token in call.token_ids]
        ratios[f"turns_{turns}"] = round(whole.input_ids.numel() / last.input_ids.numel(), 3)
    return ratios


def chunked(model: Any, packed: Packed) -> Tensor:
    """As in the trainer."""
    return token_logprobs(model, packed, chunked_head=LogitTransform())[0]


def plain(model: Any, packed: Packed) -> Tensor:
    """Log-softmax over the logits of all tokens of the rows."""
    logits = model(packed.input_ids, attention_mask=packed.attention_mask, use_cache=False).logits.float()
    chosen = logits.log_softmax(-1)[packed.row, packed.keep[packed.column]]
    return chosen.gather(-1, packed.target[:, None])


def seconds(model: Any, packed: Packed, logprobs: Callable[[Any, Packed], Tensor]) -> float:
    """One forward and backward."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16) if fast_precision("cpu") == "bf16-mixed" else contextlib.nullcontext():
        loss = logprobs(model, packed).sum()
    loss.backward()
    return time.process_time() - began


def main() -> None:
    """Measures and writes."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="runs/models/SmolLM2-135M-Instruct")
    disable_progress_bar()
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(parser.parse_args().model, dtype=torch.float32)
    model.train()
    path = probe(model, [], attn_implementation="sdpa")
    assert path.shared and path.chunked_head
    results: dict[str, Any] = {"dtype": fast_precision("cpu")}
    print(f"{results['dtype']}\nprompt completion samples    rows  processor seconds: shared, ordinary, plain")
    ratios = {}
    for case in GRID:
        turns = [group(*case, seed) for seed in range(4 if case == KEY else 1)]
        shared, ordinary = path.pack(turns), pack(turns, shared=False)
        contenders = [(shared, chunked), (ordinary, chunked)]
        if case == KEY:
            contenders.append((ordinary, plain))
        times: list[list[float]] = [[] for _ in contenders]
        if shared.input_ids.shape != ordinary.input_ids.shape:
            seconds(model, shared, chunked)  # the first of a shape is slow
            for _ in range(REPEATS):
                for contender, found in zip(contenders, times, strict=True):
                    found.append(seconds(model, *contender))
        medians = [statistics.median(found) for found in times if found]
        name = "_".join(map(str, case))
        ratios[name] = round(medians[1] / medians[0], 3) if medians else 1.0
        if len(medians) > 2:
            results[f"plain_ratio_{name}"] = round(medians[2] / medians[0], 3)
        rows = "x".join(map(str, shared.input_ids.shape))
        print("{:6} {:10} {:7}".format(*case), f"{rows:>7}", *(f"{median:6.2f}" for median in medians), flush=True)
    results |= {f"ratio_{name}": ratio for name, ratio in ratios.items()} | {"worst_ratio": min(ratios.values())}
    results |= columns_of_turns()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "packing.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
