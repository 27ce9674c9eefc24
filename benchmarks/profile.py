"""Where the time of a step goes: in each mode, and in the operations of either side.

    python -m benchmarks.profile

Three tables. *Modes*: shares of a step's time that trainer and explorers spend with what, under each strategy, on the
demo's model with 4 groups of 8 samples of 32 tokens that are all trained. *Training*: shares of forward, backward and
optimizer step by operation, as it is (``after``) and with a row for every sample and the logits of all tokens at once
(``before``). *Exploring*: shares of an engine's decoding steps. Whatever is below 5 % everywhere is under "others".
Writes ``benchmarks/results/profile.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.profiler import ProfilerActivity, profile

import lightning_rft as rft
from benchmarks.beside import DEADLINE_S, beside, one_of_two
from benchmarks.overlap import restless, spans, trains
from benchmarks.packing import chunked, group, plain
from benchmarks.rollout import endless, questions
from lightning_rft.channel import Channel
from lightning_rft.explorer.engines.requests import Request
from lightning_rft.hardware import fast_precision
from lightning_rft.monitor.spans import Span, union
from lightning_rft.trainer.packing import pack
from lightning_rft.trainer.shortcuts import probe

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

RESULTS = Path(__file__).parent / "results"
GROUPS, SAMPLES, PROMPT, TOKENS = 4, 8, 45, 32
STRATEGIES = (  # and how many explorers each has
    (rft.Synchronous, 1),
    (rft.OneStepOffPolicy, 1),
    (rft.FullyAsynchronous, 1),
    (rft.MultiExplorerAsynchronous, 2),
)
WARM_UP = 2  # steps, as overlap has it
SMALL = 0.05
# What an operation is called in the tables, by parts of its name in the profiler.
KINDS = {
    "attention": ("scaled_dot_product", "cpu_attention", "cpu_attn", "unified_attention", "unified_kv_cache"),
    "matrix products": ("::mm", "::addmm", "::bmm", "onednn_mm"),
    "optimizer": ("_fused_adamw",),
    "sampling and log-probs": ("gumbel", "softmax", "logsumexp", "topk", "::ge", "::gather"),
    "copies and casts": ("copy_", "::clone", "::cat", "index", "zero_", "fill_"),
}


def operations(run: Callable[[], Any], vocabulary: int) -> dict[str, float]:
    """Shares of the time of a call, by kind of operation; matrix products with the output head's apart."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
    shares: Counter[str] = Counter()
    for event in profiled.key_averages(group_by_input_shape=True):
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "elementwise")
        if kind == "matrix products":
            in_head = any(vocabulary in shape for shape in event.input_shapes if isinstance(shape, list))
            kind += ", output head" if in_head else ", layers"
        shares[kind] += event.self_cpu_time_total / 1e6 / seconds
    shares["outside of operations"] = max(0.0, 1.0 - sum(shares.values()))
    return dict(shares)


def training(model_path: Path) -> dict[str, dict[str, float]]:
    """Operations of one training step, with neither shortcut and with both, and the seconds of each."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    turns = [group(PROMPT, TOKENS, SAMPLES, seed) for seed in range(GROUPS)]
    ways = {
        "before": (pack(turns, shared=False), plain),
        "after": (probe(model, turns, attn_implementation="sdpa").pack(turns), chunked),
    }
    found = {}
    for name, (packed, logprobs) in ways.items():

        def step(packed: Any = packed, logprobs: Any = logprobs) -> None:
            with (
                torch.autocast("cpu", torch.bfloat16)
                if fast_precision("cpu") == "bf16-mixed"
                else contextlib.nullcontext()
            ):
                loss = logprobs(model, packed).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(WARM_UP):
            step()
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        found[name] = operations(step, model.config.vocab_size) | {"seconds": seconds}
    return found


def exploring(channel: Channel) -> None:
    """An explorer's engine, in a process with its environment: operations of its decoding steps."""
    model, arguments, vocabulary = channel.receive()
    engine = rft.VLLMEngine(engine_args=arguments)
    engine.prepare()
    engine.start(model, max_model_len=256, seed=0)

    def rollout(name: str, *, decode_only: bool) -> Callable[[], None]:
        for slot in range(GROUPS):
            for sample, turn in enumerate(group(PROMPT, TOKENS, SAMPLES, slot)):
                sampling = rft.Sampling(TOKENS, 1.0, SAMPLES * slot + sample)
                engine.add(Request(f"{name}/{slot}/{sample}", turn.prompt_ids, sampling))
        if decode_only:
            engine.step()

        def steps() -> None:
            while engine.has_work:
                engine.step()

        return steps

    rollout("warm up", decode_only=False)()
    began = time.perf_counter()
    rollout("timed", decode_only=False)()
    seconds = time.perf_counter() - began
    channel.send(operations(rollout("profiled", decode_only=True), vocabulary) | {"seconds": seconds})


def shares(found: list[Span], ahead: int) -> dict[str, float]:
    """What trainer and explorers did from the begin of one training step to that of another, in shares of it.

    Args:
        found: All spans of a run.
        ahead: Batches that explorers are ahead by; as many steps at both ends are left out, in which they are not.
    """
    steps = trains(found)[ahead:]
    steps = steps[: len(steps) - ahead]
    begin, end = steps[0].begin, steps[-1].begin
    tracks = {span.track for span in found if span.track.startswith("explorer")}

    def share(track: str, *causes: str) -> float:
        cut = [
            (max(begin, span.begin), min(end, span.end))
            for span in found
            if span.track == track and span.cause in causes and span.end > begin and span.begin < end
        ]
        return sum(b - a for a, b in union(cut)) / (end - begin)

    result = {
        "seconds per step": (end - begin) / (len(steps) - 1),
        "trainer: train": share("trainer", "train"),
        "trainer: wait for experience": share("trainer", "wait for experience"),
        "trainer: wait for groups of old weights": share("trainer", "wait for push"),
        "trainer: push": share("trainer", "sync"),
    }
    result["trainer: others"] = 1.0 - sum(result.values()) + result["seconds per step"]
    result["in the background: write checkpoint"] = share("trainer", "write checkpoint")
    for name, causes in (
        ("rollouts", ("rollout",)),
        ("load", ("load", "load checkpoint")),
        ("wait", ("wait for weights", "wait for room")),
    ):
        result[f"explorers: {name}"] = sum(share(track, *causes) for track in tracks) / len(tracks)
    return result


def modes(model: Path, steps: int, folder: Path) -> dict[str, dict[str, float]]:
    """Shares of every mode, one after another."""
    found = {}
    arguments = endless(folder / "endless")
    for make, explorers in STRATEGIES:
        strategy: rft.SyncStrategy = make()
        ahead = strategy.max_staleness
        with rft.RFTDataModule(
            tasks=questions(WARM_UP + ahead + steps + ahead),
            reward=restless,
            engine=rft.VLLMEngine(engine_args=arguments),
            explorers=explorers,
            tasks_per_step=GROUPS,
            samples_per_task=SAMPLES,
            max_new_tokens=TOKENS,
        ) as data:
            every = spans(strategy, rft.RFTModule(model), data, WARM_UP + ahead + steps + ahead)
        found[make.__name__] = shares(every, ahead)
        print(table("mode", found), flush=True)
    return found


def table(title: str, columns: dict[str, dict[str, float]]) -> str:
    """As Markdown; shares that are small in all columns are added up."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    large = [
        name for name in names if "second" in name or max(column.get(name, 0) for column in columns.values()) >= SMALL
    ]
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]

    def row(name: str, values: list[float], form: str) -> None:
        lines.append(f"| {name} | " + " | ".join(format(value, form) for value in values) + " |")

    for name in large:
        row(name, [column.get(name, 0.0) for column in columns.values()], ".2f" if "second" in name else ".0%")
    small = [name for name in names if name not in large]
    if small:
        row("others", [sum(column.get(name, 0.0) for name in small) for column in columns.values()], ".0%")
    return "\n".join(lines)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="of each mode, after a warm-up")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    from convert_smollm2 import smollm2
    from transformers import AutoConfig

    model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    results: dict[str, Any] = {"dtype": fast_precision("cpu")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with beside("benchmarks.profile") as channel:
            channel.send((str(model), endless(folder / "decoding"), vocabulary))
            results["exploring"] = {"decoding": channel.receive(DEADLINE_S)}
        print(table("explorer", results["exploring"]), flush=True)
        results["training"] = training(model)
        print(table("trainer", results["training"]), flush=True)
        results["modes"] = modes(model, arguments.steps, folder)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "profile.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    one_of_two(main, exploring)
