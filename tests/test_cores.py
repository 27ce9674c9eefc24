"""Who gets how many CPU cores: all of them where sides take turns, a share where they work at the same time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft
from lightning_rft.run import placement
from tests.trainer_and_data import fake_data, quiet_trainer


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


class Look(L.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        self.trainers = torch.get_num_threads()
        children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
        for pid in " ".join(path.read_text() for path in children).split():
            if b"explorer.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                self.explorers = next(line for line in environment if line.startswith(b"OMP_NUM_THREADS="))


@pytest.mark.parametrize(
    ("strategy", "explorers", "trainers"),
    [(rft.Synchronous(), 4, 4), (rft.OneStepOffPolicy(), 2, 2), (rft.FullyAsynchronous(), 2, 2)],
)
def test_cores(
    strategy: rft.SyncStrategy,
    explorers: int,
    trainers: int,
    threads: int,
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "available_cpus", lambda: threads)
    look = Look()
    data = fake_data(tasks=["1 + 1 =", "1 + 2 ="], tasks_per_step=1, max_new_tokens=4, buffer=":memory:")
    trainer = quiet_trainer(tmp_path, look, strategy, max_epochs=1)
    trainer.fit(rft.RFTModule(tiny_model_path), data)
    assert look.trainers == trainers
    assert look.explorers == f"OMP_NUM_THREADS={explorers}".encode()
    assert torch.get_num_threads() == threads
