"""Samples per second of whole training steps, beside TRL's ``GRPOTrainer`` on the same model, tasks and cores.

    pip install 'lightning-rft[bench]'
    python -m benchmarks.vs_trl

Two lines. *equal*: no token ends an answer and the reward differs within every group, so both sides sample and train
exactly as many completion tokens, which is checked by what was counted. *used*: the demo's task as it is, with
whatever each side does about it. TRL runs as a user of this machine would run it: with its defaults (gradient
checkpointing among them), one optimizer step a batch, and generation by vLLM on a GPU and by transformers elsewhere;
``trl_plain`` is TRL once more without gradient checkpointing, which a small model does not need. Ours is
``Synchronous`` and ``FullyAsynchronous``.

Both compute in bfloat16 autocast over float32 weights; on a CPU without units for bfloat16, where it is a hundred
times slower, both in float32. All take turns, each time in a process of its own; steps are counted after a warm-up.
Writes ``benchmarks/results/vs_trl.json``: a figure is the median of the rounds' ratios of samples per second, ours /
TRL's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

RESULTS = Path(__file__).parent / "results"
MODEL = Path("runs/models/SmolLM2-135M-Instruct")
GROUPS, SAMPLES, LEARNING_RATE, SEED = 4, 8, 1e-5, 0
TOKENS = {"equal": 32, "used": 12}  # most of an answer; 12 are the demo's
SIDES = ("trl", "synchronous", "fully_async", "trl_plain")
WARM_UP = 2  # in the second step, too, memory is touched for the first time


def restless(text: str) -> float:
    """A reward that differs within every group, so that every sample is trained."""
    return float(sum(map(ord, text)) % 101)


def precision() -> str:
    """Lightning's name of the precision that both train in."""
    import torch

    from lightning_rft.hardware import fast_precision

    return fast_precision("cuda" if torch.cuda.is_available() else "cpu")


def trl(line: str, steps: int, model: str, out: str, *, checkpointing: bool) -> dict[str, Any]:
    """TRL's side, in this process."""
    import torch
    from datasets import Dataset
    from demo import sums
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import lightning_rft as rft
    from lightning_rft.rewards import last_number

    ends: list[float] = []
    generations: list[float] = []
    tokens: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def reward(completions: list[Any], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        texts = [completion[0]["content"] for completion in completions]
        if line == "equal":
            return [restless(text) for text in texts]
        return [last_number(text, rft.Task("", answer=right)) for text, right in zip(texts, answer, strict=True)]

    tasks, _ = sums(SEED)
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {} if checkpointing else {"gradient_checkpointing": False}
    if line == "equal":
        settings["generation_kwargs"] = {("min_tokens" if on_gpu else "min_new_tokens"): TOKENS[line]}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=out,
            max_steps=WARM_UP + steps,
            per_device_train_batch_size=GROUPS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=TOKENS[line],
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            model_init_kwargs={"dtype": "float32"},
            bf16=precision() == "bf16-mixed",
            fp16=precision() == "16-mixed",
            use_cpu=not on_gpu,
            use_vllm=on_gpu,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=SEED,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": list(task.prompt), "answer": task.answer} for task in tasks]),
        callbacks=[Watch()],
    )
    if not on_gpu:
        generate = trainer.model.generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = generate(*args, **kwargs)
            generations.append(time.perf_counter() - began)
            return result

        trainer.model.generate = timed
    trainer.train()
    split = {"generation_s": statistics.median(generations[WARM_UP:])} if generations else {}
    return measured(ends, tokens, steps) | split


def ours(line: str, steps: int, model: str, out: str, *, synchronous: bool) -> dict[str, Any]:
    """Our side, in this process."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the demo and the command line have it

    import lightning as L
    import torch
    from demo import sums
    from lightning.pytorch.callbacks import Callback

    import lightning_rft as rft
    from lightning_rft.rewards import last_number
    from lightning_rft.trainer.loader import BatchPart

    ends: list[float] = []
    tokens: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: BatchPart, batch_idx: int
        ) -> None:
            ends.append(time.perf_counter())
            tokens.append(sum(group.num_tokens for group in batch.groups))

    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    strategy = rft.Synchronous() if synchronous else rft.FullyAsynchronous()
    # Explorers are ahead by up to the staleness bound. With as many steps before and after the counted ones they are
    # so at both ends, and exploring goes on in all of them.
    ahead = strategy.max_staleness
    tasks, _ = sums(SEED)
    engine = rft.VLLMEngine()
    if line == "equal":
        endless = Path(out) / "endless"
        endless.mkdir()
        (endless / "generation_config.json").write_text("{}")  # one that names no token that ends an answer
        engine = rft.VLLMEngine(engine_args={"generation_config": str(endless)})
    timeline = rft.TimelineCallback()
    L.seed_everything(SEED, verbose=False)
    L.Trainer(
        max_steps=ahead + WARM_UP + steps + ahead,
        accelerator="auto",
        devices=1,
        precision=precision(),
        gradient_clip_val=1.0,
        callbacks=[timeline, strategy, Watch()],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=out,
    ).fit(
        rft.RFTModule(model, optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, weight_decay=0.0, fused=True)),
        rft.RFTDataModule(
            tasks=tasks,
            reward=(lambda completion, task: restless(completion)) if line == "equal" else last_number,
            engine=engine,
            tasks_per_step=GROUPS,
            samples_per_task=SAMPLES,
            max_new_tokens=TOKENS[line],
        ),
    )
    counted = range(ahead + WARM_UP, ahead + WARM_UP + steps)

    def median(track: str, *what: str) -> float:
        found = [s.end - s.begin for s in timeline.spans if s.track.startswith(track) and s.what in what]
        return statistics.median(found[ahead + WARM_UP :])

    rollouts = [
        [span for span in timeline.spans if span.what == "rollout" and span.batch == batch] for batch in counted
    ]
    split = {
        "generation_s": statistics.median(
            max(s.end for s in batch) - min(s.begin for s in batch) for batch in rollouts
        ),
        "training_s": median("trainer", "train"),
        "push_s": median("trainer", "sync", "write checkpoint"),
        "load_s": median("explorer", "load", "load checkpoint"),
    }
    end = ahead + WARM_UP + steps
    return measured(ends[ahead:end], tokens[ahead:end], steps) | split


def measured(ends: list[float], tokens: list[int], steps: int) -> dict[str, Any]:
    """The counted steps: from the end of the warm-up to the end of the last."""
    assert len(ends) == len(tokens) == WARM_UP + steps, f"{len(ends)} steps"
    seconds = (ends[-1] - ends[WARM_UP - 1]) / steps
    return {
        "samples_per_s": GROUPS * SAMPLES / seconds,
        "seconds_per_step": seconds,
        "tokens": tokens[WARM_UP:],
    }


def section(side: str, line: str, steps: int, model: str) -> dict[str, Any]:
    """Measures one side in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        result = Path(out) / "result.json"
        command = [sys.executable, "-m", "benchmarks.vs_trl", "--model", model, "--steps", str(steps)]
        command += ["--section", side, line, out]
        with (Path(out) / "log").open("w+") as log:
            if subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=False).returncode:
                log.seek(0)
                raise SystemExit(log.read()[-5000:])
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def run_section(side: str, line: str, out: str, steps: int, model: str) -> None:
    """What that process does."""
    if side.startswith("trl"):
        result = trl(line, steps, model, out, checkpointing=side == "trl")
    else:
        result = ours(line, steps, model, out, synchronous=side == "synchronous")
    (Path(out) / "result.json").write_text(json.dumps(result))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and the ratios of each round."""
    results: dict[str, Any] = {}
    for line in dict.fromkeys(run["line"] for run in runs):
        by_side = {side: [run for run in runs if (run["line"], run["side"]) == (line, side)] for side in SIDES}
        for side in SIDES[1:]:
            ratios = [
                mine["samples_per_s"] / theirs["samples_per_s"]
                for mine, theirs in zip(by_side[side], by_side["trl"], strict=False)
            ]
            if ratios:
                results[f"{line}_{side}"] = round(statistics.median(ratios), 2)
    for line in dict.fromkeys(run["line"] for run in runs):
        for side in SIDES:
            of_side = [run for run in runs if (run["line"], run["side"]) == (line, side)]
            names = [name for name in of_side[0] if name not in ("line", "side", "tokens")] if of_side else []
            medians = {name: round(statistics.median(run[name] for run in of_side), 3) for name in names}
            if of_side:
                tokens = [count for run in of_side for count in run["tokens"]]
                results[f"{line}: {side}"] = medians | {"tokens_per_step": round(statistics.fmean(tokens), 1)}
    return results


def table(results: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| | samples/s | s/step | generation | training | push | load | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = ("samples_per_s", "seconds_per_step", "generation_s", "training_s", "push_s", "load_s", "tokens_per_step")
    for name, values in results.items():
        if isinstance(values, dict):
            lines.append(f"| {name} | " + " | ".join(str(values.get(column, "")) for column in names) + " |")
    return "\n".join(lines)


def write(runs: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """All that there is so far: it takes a while."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "vs_trl.json").write_text(json.dumps(summary(runs) | about | {"runs": runs}, indent=1) + "\n")


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="counted in each round")
    parser.add_argument("--lines", nargs="+", default=list(TOKENS), choices=list(TOKENS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--model", help="another model's folder; nothing is written then")
    parser.add_argument("--section", nargs=3, metavar=("SIDE", "LINE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("This compares with TRL, which is not installed: pip install 'lightning-rft[bench]'")
    if arguments.section:
        side, line, folder = arguments.section
        run_section(side, line, folder, arguments.steps, arguments.model)
        return
    model = arguments.model
    if model is None:
        from convert_smollm2 import smollm2

        model = str(smollm2(MODEL))
    import trl as installed

    print(f"TRL {installed.__version__}; both in {precision()}", flush=True)
    about = {"trl_version": installed.__version__, "precision": precision(), "rounds": arguments.rounds}
    runs: list[dict[str, Any]] = []
    for _ in range(arguments.rounds):
        for line in arguments.lines:
            for side in arguments.sides:
                runs.append({"line": line, "side": side} | section(side, line, arguments.steps, model))
                print(json.dumps(runs[-1]), flush=True)
                if arguments.model is None:
                    write(runs, about)
            counts = {count for run in runs if run["line"] == "equal" for count in run["tokens"]}
            assert counts <= {GROUPS * SAMPLES * TOKENS["equal"]}, f"unequal numbers of tokens: {counts}"
    results = summary(runs)
    print("\n" + table(results))
    for name, value in results.items():
        if not isinstance(value, dict):
            print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
