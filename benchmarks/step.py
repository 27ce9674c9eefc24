"""A training step's time against that of another checkout, or of another precision, paired on one machine.

    git worktree add ../before v0.2.0
    python -m benchmarks.step --against ../before             # ratio of this checkout's step to that one's
    python -m benchmarks.step --precision bf16-true           # ratio to the same checkout in bf16-mixed

Two processes train on the same stored experience (4 groups of 8 samples of 24 tokens, all with signal) and take turns,
a step each, so that what disturbs one disturbs the other. Prints the median of the ratios of neighbouring steps, and
the 95 % interval of a bootstrap over pairs; writes nothing. Stands on the public API alone, so that any checkout of the
last versions can be compared.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = Path("runs/models/SmolLM2-135M-Instruct")
GROUPS, SAMPLES, PROMPT, TOKENS = 4, 8, 45, 24
WARM_UP = 3


def experience(path: Path, batches: int) -> None:
    """Writes a buffer of random tokens."""
    from lightning_rft.buffer.ledger import Ledger
    from lightning_rft.experience import Experience, Group, GroupKey, Turn

    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(100, 40_000) for _ in range(count))

    with Ledger.open(path) as ledger:
        ledger.begin()
        for number in range(batches * GROUPS):
            key, prompt = GroupKey(number // GROUPS, number % GROUPS), tokens(PROMPT)
            ledger.issue(key, str(number), epoch=0, explorer=0)
            turns = [Turn(prompt, tokens(TOKENS), (-10.0,) * TOKENS, (0,) * TOKENS, "stop") for _ in range(SAMPLES)]
            samples = tuple(Experience(str(number), i, (turn,), float(i)) for i, turn in enumerate(turns))
            ledger.ready(Group(key, str(number), samples))


def train(buffer: str, precision: str, model: str) -> None:
    """One side: trains a batch for each line that it reads, and answers with its seconds."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import Callback

    import lightning_rft as rft

    class OnDemand(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            sys.stdin.readline()
            self.began = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            print("seconds", time.perf_counter() - self.began, flush=True)

    trainer = L.Trainer(
        max_epochs=1,
        precision=precision,  # type: ignore[arg-type]
        callbacks=[OnDemand()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp(),
    )
    module = rft.RFTModule(model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6, fused=True))
    data = rft.RFTDataModule(explorers=0, buffer=rft.Buffer(buffer), tasks_per_step=GROUPS, samples_per_task=SAMPLES)
    trainer.fit(module, data)


class Side:
    """A process that trains on demand."""

    def __init__(self, checkout: Path, buffer: Path, precision: str, model: Path) -> None:
        code = Path(__file__).read_text()
        command = [sys.executable, "-c", code, "--side", str(buffer), "--precision", precision, "--model", str(model)]
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> float:
        """Seconds of the next step."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds"):
                return float(line.split()[1])
        raise RuntimeError(f"a side has ended with {self._process.wait()}")

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


def interval(ratios: list[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--precision", help="of this checkout; of the other it is this machine's fastest")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        train(options.side, options.precision, str(options.model))
        return
    from lightning_rft.hardware import fast_precision

    here, usual = Path(__file__).resolve().parents[1], fast_precision("cpu")
    with tempfile.TemporaryDirectory() as folder:
        buffer = Path(folder) / "stored.sqlite"
        experience(buffer, WARM_UP + options.steps)
        model = options.model.resolve()
        sides = [
            Side(here, buffer, options.precision or usual, model),
            Side((options.against or here).resolve(), buffer, usual, model),
        ]
        try:
            for side in sides * WARM_UP:
                side.step()
            pairs = []
            for number in range(options.steps):
                order = sides if number % 2 else sides[::-1]
                seconds = {id(side): side.step() for side in order}
                pairs.append([seconds[id(side)] for side in sides])
        finally:
            for side in sides:
                side.close()
    ratios = [mine / other for mine, other in pairs]
    low, high = interval(ratios)
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{mine:.3f} s here, {other:.3f} s there; ratio {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
