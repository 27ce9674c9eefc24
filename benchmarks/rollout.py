"""How fast an explorer is, with all that is around its engine, in shares of the engine alone.

    python -m benchmarks.rollout

On one side the whole path of a rollout: the trainer's process issues groups, an explorer process encodes, samples,
decodes and scores them, and the answers are written to the buffer; nothing is trained. On the other is a process with
``vllm.LLM.generate``, with the same prompts, number of samples, limits, dtype, threads and engine settings, a seed for
every sample, and log-probs, which training needs. No token ends an answer, so both sample equally many. They take
turns, and both are started anew several times, since two processes that do the same differ by up to a tenth for as long
as they live. ``ratio`` is the median of the rounds' ratios.

A second case has several times as many samples as the engine has slots, and answers of very different lengths
(lognormal, sigma 0.8): there the schedule issues a group whenever a slot is free, and the other side is the explorer's
engine itself, with nothing around it and all requests queued in it from the start. Its figure is ``crowded_ratio``.
Writes ``benchmarks/results/rollout.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import lightning_rft as rft
from benchmarks.beside import DEADLINE_S, beside, one_of_two
from benchmarks.overlap import restless, spans
from lightning_rft.channel import Channel
from lightning_rft.explorer.engines.requests import Request
from lightning_rft.hardware import fast_dtype
from lightning_rft.tasks.prompts import encode_prompt
from lightning_rft.testing import tiny_model
from lightning_rft.trainer.loader import BatchPart

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

RESULTS = Path(__file__).parent / "results"
GROUPS, SAMPLES, MAX_MODEL_LEN = 4, 8, 256
LONGEST, SIGMA = 4, 0.8  # of answers whose lengths differ, the former in means


@dataclass(frozen=True)
class Case:
    """What is asked, and of how large an engine."""

    batches: int
    tokens: int  # of an answer, or in the mean
    slots: int
    uneven: bool = False

    def length(self, batch: int, slot: int, sample: int) -> int:
        """Tokens of an answer."""
        if not self.uneven:
            return self.tokens
        factor = random.Random(repr((batch, slot, sample))).lognormvariate(-(SIGMA**2) / 2, SIGMA)
        return max(1, round(self.tokens * min(factor, LONGEST)))

    @property
    def lengths(self) -> list[int]:
        """Of all answers, in order."""
        order = ((b, slot, sample) for b in range(self.batches) for slot in range(GROUPS) for sample in range(SAMPLES))
        return [self.length(*place) for place in order]


class Measured(rft.VLLMEngine):
    """Samples answers of the lengths of a case."""

    case: Case

    @classmethod
    def of(cls, case: Case, dtype: str, folder: Path) -> Measured:
        """The engine for a case."""
        engine = cls(
            dtype=dtype, max_num_seqs=case.slots, max_model_len=MAX_MODEL_LEN, engine_args=endless(folder / "endless")
        )
        engine.case = case
        return engine

    def add(self, request: Request) -> None:
        """Queues a request with a limit of its own."""
        _, batch, slot, _, sample, *_ = map(int, request.id.split("/"))
        length = self.case.length(batch, slot, sample)
        super().add(replace(request, sampling=replace(request.sampling, max_new_tokens=length)))


class Consumes(rft.RFTModule):
    """Takes experience and trains nothing."""

    tokens = 0

    def training_step(self, batch: BatchPart, batch_idx: int) -> None:
        """Counts; the optimizer leaves parameters alone that have no gradient."""
        self.tokens += sum(group.num_tokens for group in batch.groups)


def endless(folder: Path) -> dict[str, Any]:
    """Engine arguments with which no token ends an answer."""
    folder.mkdir()
    (folder / "generation_config.json").write_text("{}")
    return {"generation_config": str(folder)}


def questions(batches: int) -> list[rft.Task]:
    """Tasks as in the demo; two sides that are given as many explore the same."""
    return [
        rft.Task([{"role": "user", "content": f"What is {index}+{index % 7}? Answer with a number."}])
        for index in range(GROUPS * batches)
    ]


def ours(model: Path, data: rft.RFTDataModule, batches: int) -> tuple[float, int]:
    """Seconds from the first group issued to the last one stored, and tokens; all by one version, so none is pushed."""
    module = Consumes(model)
    found = spans(rft.Synchronous(sync_interval=batches), module, data, batches)
    rollouts = [span for span in found if span.what == "rollout"]
    stored = [span for span in found if span.what == "put"]
    assert len(rollouts) == len(stored) == GROUPS * batches
    return max(span.end for span in stored) - min(span.begin for span in rollouts), module.tokens


def reference(channel: Channel) -> None:
    """The other side's process: an engine, and a round each time that it is asked for one."""
    rft.VLLMEngine().prepare()
    case, settings = channel.receive()
    if case["uneven"]:
        queued(channel, Case(**case), settings)
    else:
        generated(channel, settings)


def queued(channel: Channel, case: Case, settings: dict[str, Any]) -> None:
    """Rounds of the explorer's engine with all requests at once."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        engine = Measured.of(case, settings["dtype"], Path(folder))
        engine.start(settings["model"], max_model_len=settings["max_model_len"], seed=0)
        tokenizer = AutoTokenizer.from_pretrained(settings["model"])
        channel.send(None)
        while (asked := channel.receive()) is not None:
            tasks, _ = asked
            engine._alive.reset_prefix_cache()
            began = time.perf_counter()
            for index, task in enumerate(tasks):
                prompt = encode_prompt(tokenizer, task.prompt)
                for sample in range(SAMPLES):
                    name = f"0/{index // GROUPS}/{index % GROUPS}/1/{sample}/0/0"
                    sampling = rft.Sampling(max(case.lengths), 1.0, index * SAMPLES + sample)
                    engine.add(Request(name, prompt, sampling))
            tokens = 0
            while engine.has_work:
                tokens += sum(len(completion.token_ids) for completion in engine.step())
            channel.send((time.perf_counter() - began, tokens))


def generated(channel: Channel, settings: dict[str, Any]) -> None:
    """Rounds of ``vllm.LLM.generate``."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    llm = LLM(enforce_eager=on_cpu, async_scheduling=False, **({"block_size": 32} if on_cpu else {}), **settings)
    tokenizer = llm.get_tokenizer()
    channel.send(None)
    while (asked := channel.receive()) is not None:
        tasks, lengths = asked
        prompts = [
            tokenizer.apply_chat_template(list(task.prompt), add_generation_prompt=True, tokenize=False)
            for task in tasks
            for _ in range(SAMPLES)
        ]
        params = [
            SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, logprobs=0, seed=seed)
            for seed, length in enumerate(lengths)
        ]
        llm.reset_prefix_cache()
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        channel.send((seconds, sum(len(output.outputs[0].token_ids) for output in outputs)))


def rounds(model: Path, dtype: str, case: Case, repeats: int) -> Iterator[tuple[float, float]]:
    """Starts both sides, and yields our tokens per second and theirs, round by round."""
    tasks = questions(case.batches)
    expected = sum(case.lengths)
    with beside("benchmarks.rollout") as channel, tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": case.slots,
            "logprobs_mode": "processed_logprobs",
        }
        channel.send((asdict(case), settings))
        channel.receive(DEADLINE_S)  # up; so that neither start disturbs the other's
        with rft.RFTDataModule(
            tasks=rft.TaskSet(tasks, shuffle=False),
            reward=restless,
            engine=Measured.of(case, dtype, Path(folder)),
            tasks_per_step=GROUPS,
            samples_per_task=SAMPLES,
            max_new_tokens=max(case.lengths),
        ) as data:
            for repeat in range(repeats + 1):
                seconds, tokens = ours(model, data, case.batches)
                channel.send((tasks, case.lengths))
                theirs, their_tokens = channel.receive(DEADLINE_S)
                assert tokens == their_tokens == expected
                if repeat > 0:  # everything runs for the first time in the first
                    yield expected / seconds, expected / theirs


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=4, help="of both sides")
    parser.add_argument("--repeats", type=int, default=2, help="after each start")
    parser.add_argument("--batches", type=int, default=2, help="of 4 groups of 8 samples, in each round")
    parser.add_argument("--tokens", type=int, default=48, help="of every answer")
    parser.add_argument("--only", choices=["even", "crowded"], help="one of the two cases; the other's figures stay")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a look at the benchmark itself")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    dtype = fast_dtype("cuda" if torch.cuda.is_available() else "cpu")
    cases = {
        "": Case(arguments.batches, arguments.tokens, slots=64),
        "crowded_": Case(arguments.batches + 1, arguments.tokens * 2 // 3, slots=16, uneven=True),
    }
    chosen = {"even": [""], "crowded": ["crowded_"], None: list(cases)}[arguments.only]
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tiny:
            model = tiny_model(Path(folder) / "tiny")
        else:
            from convert_smollm2 import smollm2

            model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))
        for case in chosen:
            both = [
                pair for _ in range(arguments.starts) for pair in rounds(model, dtype, cases[case], arguments.repeats)
            ]
            rates[f"{case}ratio"] = [ours / theirs for ours, theirs in both]
            rates[f"{case}ours_tokens_per_s"] = [ours for ours, _ in both]
            rates[f"{case}{'engine' if case else 'vllm'}_tokens_per_s"] = [theirs for _, theirs in both]
    results: dict[str, Any] = {name: round(statistics.median(values), 3) for name, values in rates.items()}
    results |= {f"{case}dtype": dtype for case in chosen}
    for name, values in rates.items():
        print(f"{name:26} {results[name]:8}   of", *(f"{value:.3f}" for value in values))
    if not arguments.tiny:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "rollout.json"
        before = json.loads(path.read_text()) if path.exists() and arguments.only else {}
        path.write_text(json.dumps(before | results, indent=1) + "\n")


if __name__ == "__main__":
    one_of_two(main, reference)
