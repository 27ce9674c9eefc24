"""What a token costs rank 0: from an explorer's message through the buffer to the tensors of a training step.

    python -m benchmarks.tokens

Groups of 8 samples with 500 tokens each, 4 groups a batch, as in :mod:`benchmarks.buffer`, in memory. Microseconds of
CPU time a token of each part, the medians of the repeats; and bytes a token of the message, of what it is in memory,
and of the file, each without the text. Writes
``benchmarks/results/tokens.json``.
"""

from __future__ import annotations

import json
import pickle
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import numpy as np
import torch

from benchmarks.buffer import BATCHES, GROUPS, RESULTS, SAMPLES, TEXT, TOKENS, groups
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.experience import Group
from lightning_rft.explorer.messages import Explored
from lightning_rft.trainer.packing import pack

REPEATS = 7


def tensors(batch: Sequence[Group]) -> None:
    """As the training step does."""
    turns = [[turn for experience in group.experiences for turn in experience.turns] for group in batch]
    pack(turns, shared=False)
    torch.from_numpy(np.concatenate([turn.logprobs for group in turns for turn in group]))


def main() -> None:
    """Measures and writes."""
    torch.set_num_threads(1)
    stored = groups()
    tokens = BATCHES * GROUPS * SAMPLES * TOKENS
    messages = [cloudpickle.dumps(Explored(1, group.key, 1, group.task_id, group.experiences)) for group in stored]
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = function()
        seconds.setdefault(name, []).append(time.process_time() - began)
        return found

    size = 0
    for _ in range(REPEATS):
        with Ledger.open(":memory:") as ledger:
            ledger.begin()
            for group in stored:
                ledger.issue(group.key, group.task_id, 0, 0)
            received = timed("unpickle", lambda: [pickle.loads(message) for message in messages])
            arrived = [Group(one.key, one.task_id, one.experiences) for one in received]
            timed("store", lambda arrived=arrived: [ledger.ready(group) for group in arrived])
            keys = [[group.key for group in arrived[i : i + GROUPS]] for i in range(0, len(arrived), GROUPS)]
            leased = timed("lease", lambda keys=keys: [ledger.lease(batch) for batch in keys])
            timed("tensors", lambda leased=leased: [tensors(batch) for batch in leased])
            if not size:
                (size,) = ledger._file.ask("SELECT sum(length(turns)) FROM experiences")[0]
    results = {f"{name}_us": round(statistics.median(found) / tokens * 1e6, 4) for name, found in seconds.items()}
    results["sum_us"] = round(sum(results.values()), 4)
    text = BATCHES * GROUPS * len(TEXT)  # the same object in every sample of a group
    results["message_bytes"] = round((sum(map(len, messages)) - text) / tokens, 2)
    tracemalloc.start()
    held = [pickle.loads(message) for message in messages]
    results["memory_bytes"] = round((tracemalloc.get_traced_memory()[0] - text) / tokens, 2)
    del held
    results["file_bytes"] = round(size / tokens, 2)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tokens.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
