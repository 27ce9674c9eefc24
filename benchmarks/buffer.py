"""How many samples per second pass through the buffer: issued, stored, leased and marked as trained.

    python -m benchmarks.buffer

Groups of 8 samples with 500 tokens each, 4 groups a batch, on a disk and in memory; and for comparison the same groups
through a bare ``multiprocessing.Queue`` and back out of it, which keeps nothing. All take turns; each number is the
median of the repeats.
Writes ``benchmarks/results/buffer.json``.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lightning_rft.buffer.ledger import Ledger
from lightning_rft.experience import Experience, Group, GroupKey, Turn

RESULTS = Path(__file__).parent / "results"
BATCHES, GROUPS, SAMPLES, TOKENS, PROMPT, REPEATS = 40, 4, 8, 500, 64, 7
TEXT = "the answer in words, " * 100  # about as long as its tokens are


def groups() -> list[Group]:
    """What explorers would send."""
    rng = random.Random(0)

    def turn() -> Turn:
        return Turn(
            prompt_ids=tuple(rng.randrange(150_000) for _ in range(PROMPT)),
            token_ids=tuple(rng.randrange(150_000) for _ in range(TOKENS)),
            logprobs=tuple(-rng.expovariate(1.0) for _ in range(TOKENS)),
            versions=(3,) * TOKENS,
            finish_reason="stop",
        )

    def group(index: int) -> Group:
        task = str(index)
        samples = tuple(Experience(task, sample, (turn(),), 1.0, TEXT, 1.0, 0.1) for sample in range(SAMPLES))
        return Group(GroupKey(*divmod(index, GROUPS)), task, samples)

    return [group(index) for index in range(BATCHES * GROUPS)]


def through_ledger(path: str, stored: list[Group]) -> float:
    """Seconds from the first issue to the last batch trained."""
    with Ledger.open(path) as ledger:
        ledger.begin()
        began = time.perf_counter()
        for batch in range(BATCHES):
            part = stored[batch * GROUPS : (batch + 1) * GROUPS]
            for group in part:
                ledger.issue(group.key, group.task_id, 0, 0)
            for group in part:
                ledger.ready(group)
            ledger.lease([group.key for group in part])
            ledger.trained(batch)
        return time.perf_counter() - began


def through_file(stored: list[Group]) -> float:
    """On the disk of the temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return through_ledger(f"{folder}/buffer.sqlite", stored)


def through_queue(stored: list[Group]) -> float:
    """In and out, a batch at a time."""
    queue: multiprocessing.Queue[Group] = multiprocessing.Queue()
    began = time.perf_counter()
    for batch in range(BATCHES):
        for group in stored[batch * GROUPS : (batch + 1) * GROUPS]:
            queue.put(group)
        for _ in range(GROUPS):
            queue.get()
    seconds = time.perf_counter() - began
    queue.close()
    queue.join_thread()
    return seconds


def main() -> None:
    """Measures and writes."""
    stored = groups()
    contenders: dict[str, Callable[[], float]] = {
        "durable_samples_per_s": lambda: through_file(stored),
        "memory_samples_per_s": lambda: through_ledger(":memory:", stored),
        "queue_samples_per_s": lambda: through_queue(stored),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(REPEATS):
        for name, measure in contenders.items():
            rates[name].append(len(stored) * SAMPLES / measure())
    results = {name: round(statistics.median(found)) for name, found in rates.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "buffer.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    for name, found in rates.items():
        print(name, *(round(rate) for rate in found))


if __name__ == "__main__":
    main()
