"""Two explorers, one four times slower: together they should be as fast as the sum of both.

    python -m benchmarks.uneven

With FakeEngine, whose speed is set, under ``MultiExplorerAsynchronous`` at several staleness bounds: the smaller the
bound, the more often the fast explorer waits for what the slow one has begun. ``staleness_B`` is the rate of both over
the sum of what each does alone with the largest bound, and ``staleness_B_over_fast`` over that of the fast one alone
with the same bound: below 1, it does better without the other. The last steps are left out: nothing new is explored
then, and what is measured is the rate at which two can go on.
Writes ``benchmarks/results/uneven.json``.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import lightning_rft as rft
from benchmarks.overlap import restless, spans, trains
from lightning_rft.testing import tiny_model

RESULTS = Path(__file__).parent / "results"
STEPS, GROUPS, SAMPLES, TOKENS = 28, 4, 4, 20
BOUNDS = 2, 4, 8
SPEEDS = {"fast": 100.0, "slow": 25.0}  # tokens per second of each running request


class Uneven(rft.FakeEngine):
    """As fast as the device that it is given says."""

    def start(self, model: str, *, max_model_len: int, seed: int) -> None:
        """Looks at its device."""
        self.tokens_per_second = SPEEDS[os.environ["CUDA_VISIBLE_DEVICES"]]
        super().start(model, max_model_len=max_model_len, seed=seed)


def samples_per_second(strategy: rft.SyncStrategy, devices: list[str], model: Path) -> float:
    """Samples trained per second with these explorers."""
    pool = rft.ExplorerPool(Uneven(mean_tokens=TOKENS, max_num_seqs=2 * SAMPLES), len(devices), devices=devices)
    data = rft.RFTDataModule(
        tasks=[f"{index} + 1 =" for index in range(STEPS * GROUPS)],
        reward=restless,
        explorers=pool,
        tasks_per_step=GROUPS,
        samples_per_task=SAMPLES,
        max_new_tokens=4 * TOKENS,
    )
    steps = trains(spans(strategy, rft.RFTModule(model), data, STEPS))[: -max(BOUNDS)]
    return GROUPS * SAMPLES * (len(steps) - 1) / (steps[-1].begin - steps[0].begin)


def main() -> None:
    """Measures and writes."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "tiny")
        alone = {
            device: samples_per_second(rft.FullyAsynchronous(max_staleness=max(BOUNDS)), [device], model)
            for device in SPEEDS
        }
        results |= {f"{device}_samples_per_s": rate for device, rate in alone.items()}
        for bound in BOUNDS:
            both = samples_per_second(rft.MultiExplorerAsynchronous(max_staleness=bound), list(SPEEDS), model)
            results[f"staleness_{bound}"] = both / sum(alone.values())
            fast = samples_per_second(rft.FullyAsynchronous(max_staleness=bound), ["fast"], model)
            results[f"staleness_{bound}_over_fast"] = both / fast
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "uneven.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
