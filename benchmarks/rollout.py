"""How fast an explorer is, with all that is around its engine, in shares of the engine alone.

    python -m benchmarks.rollout

On one side the whole path of a rollout: the trainer's process issues groups, an explorer process encodes, samples,
decodes and scores them, and the answers are written to the buffer; nothing is trained. On the other is a process with
``vllm.LLM.generate``, with the same prompts, number of samples, limits, dtype, threads and engine settings, a seed for
every sample, and log-probs, which training needs. No token ends an answer, so both sample equally many. They take
turns, and both are started anew several times, since two processes that do the same differ by up to a tenth for as long
as they live. ``ratio`` is the median of the rounds' ratios. Writes ``benchmarks/results/rollout.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import lightning_rft as rft
from benchmarks.overlap import restless, spans
from lightning_rft.channel import Channel, spawn
from lightning_rft.hardware import available_cpus, fast_dtype
from lightning_rft.testing import tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

RESULTS = Path(__file__).parent / "results"
GROUPS, SAMPLES, MAX_MODEL_LEN, MAX_NUM_SEQS = 4, 8, 256, 64
DEADLINE_S = 600.0  # for whatever another process is asked


class Consumes(rft.RFTModule):
    """Takes experience and trains nothing."""

    tokens = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Counts; the optimizer leaves parameters alone that have no gradient."""
        self.tokens += batch.batch_tokens


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


@contextmanager
def beside(module: str) -> Iterator[Channel]:
    """The line to another process of a benchmark, which has an explorer's environment and ends with the block."""
    environment = rft.VLLMEngine().environment(available_cpus())
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process, channel = spawn(module, environment=environment, log=log)
        try:
            yield channel
        except (EOFError, OSError) as error:  # TimeoutError is one
            raise SystemExit(f"{error!r} from {module}:\n{log.read_text()[-3000:]}") from error
        finally:
            channel.close()
            process.kill()
            process.wait(timeout=DEADLINE_S)


def ours(model: Path, data: rft.RFTDataModule, batches: int) -> tuple[float, int]:
    """Seconds from the first group issued to the last one stored, and tokens; all by one version, so none is pushed."""
    module = Consumes(model)
    found = spans(rft.Synchronous(sync_interval=batches), module, data, batches)
    rollouts = [span for span in found if span.what == "rollout"]
    stored = [span for span in found if span.what == "put"]
    assert len(rollouts) == len(stored) == GROUPS * batches
    return max(span.end for span in stored) - min(span.begin for span in rollouts), module.tokens


def reference(fd: int) -> None:
    """The other side's process: an engine, and a round each time that it is asked for one."""
    channel = Channel(fd)
    engine = rft.VLLMEngine()
    engine.prepare()
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    settings: dict[str, Any] = channel.receive()
    on_cpu = current_platform.is_cpu()
    llm = LLM(enforce_eager=on_cpu, async_scheduling=False, **({"block_size": 32} if on_cpu else {}), **settings)
    tokenizer = llm.get_tokenizer()
    channel.send(None)
    while (asked := channel.receive()) is not None:
        tasks, tokens = asked
        prompts = [
            tokenizer.apply_chat_template(list(task.prompt), add_generation_prompt=True, tokenize=False)
            for task in tasks
            for _ in range(SAMPLES)
        ]
        params = [
            SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0, seed=seed)
            for seed in range(len(prompts))
        ]
        llm.reset_prefix_cache()
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        channel.send((seconds, sum(len(output.outputs[0].token_ids) for output in outputs)))


def rounds(model: Path, dtype: str, batches: int, answer_tokens: int, repeats: int) -> Iterator[tuple[float, float]]:
    """Starts both sides, and yields our tokens per second and theirs, round by round."""
    tasks = questions(batches)
    expected = len(tasks) * SAMPLES * answer_tokens
    with beside("benchmarks.rollout") as channel, tempfile.TemporaryDirectory() as folder:
        channel.send(
            {
                "model": str(model),
                "dtype": dtype,
                "max_model_len": MAX_MODEL_LEN,
                "max_num_seqs": MAX_NUM_SEQS,
                "logprobs_mode": "processed_logprobs",
            }
        )
        channel.receive(DEADLINE_S)  # up; so that neither start disturbs the other's
        arguments = endless(Path(folder) / "endless")
        with rft.RFTDataModule(
            tasks=rft.TaskSet(tasks, shuffle=False),
            reward=restless,
            engine=rft.VLLMEngine(
                dtype=dtype, max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN, engine_args=arguments
            ),
            tasks_per_step=GROUPS,
            samples_per_task=SAMPLES,
            max_new_tokens=answer_tokens,
        ) as data:
            for repeat in range(repeats + 1):
                seconds, tokens = ours(model, data, batches)
                channel.send((tasks, answer_tokens))
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
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a look at the benchmark itself")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    dtype = fast_dtype("cuda" if torch.cuda.is_available() else "cpu")
    rates: dict[str, list[float]] = {"ours_tokens_per_s": [], "vllm_tokens_per_s": []}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tiny:
            model = tiny_model(Path(folder) / "tiny")
        else:
            from convert_smollm2 import smollm2

            model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))
        for _ in range(arguments.starts):
            for rate, their_rate in rounds(model, dtype, arguments.batches, arguments.tokens, arguments.repeats):
                rates["ours_tokens_per_s"].append(rate)
                rates["vllm_tokens_per_s"].append(their_rate)
    rates = {"ratio": [a / b for a, b in zip(*rates.values(), strict=True)]} | rates
    results = {name: round(statistics.median(values), 3) for name, values in rates.items()} | {"dtype": dtype}
    if not arguments.tiny:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "rollout.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, values in rates.items():
        print(f"{name:18} {results[name]:8}   of", *(f"{value:.3f}" for value in values))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].isdigit():
        reference(int(sys.argv[1]))
    else:
        main()
