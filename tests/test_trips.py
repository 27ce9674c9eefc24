"""How many files a task, a group and a weight pass: where that grows, somebody hands on what is not his."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest

import lightning_rft as rft
from tests.trainer_and_data import SUMS, fake_data, quiet_trainer
from tests.trips import TracedEngine, Tracer


@pytest.fixture(scope="module")
def files(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By trip: the files of both processes, in the order of the first visit."""
    folder = tmp_path_factory.mktemp("trips")
    tracer = Tracer()

    class Start(L.Callback):
        """Traces from the second batch on: what is set up once, with all the tasks, is no trip."""

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for found in tracer.files.values():
                found.clear()

    engine = TracedEngine(folder / "explorer.json")
    data = fake_data(tasks=SUMS[:3], engine=engine, tasks_per_step=1, buffer=":memory:")
    trainer = quiet_trainer(folder, rft.Synchronous(), Start(), max_steps=3)
    module = rft.RFTModule(tiny_model_path)
    tracer.start()
    try:
        trainer.fit(module, data)
    finally:
        tracer.stop()
    theirs = json.loads((folder / "explorer.json").read_text())
    theirs["task"] = theirs["task"][: theirs["task"].index("explorer/engines/fake.py") + 1]  # there it has arrived
    return {trip: list(dict.fromkeys([*ours, *theirs[trip]])) for trip, ours in tracer.files.items()}


@pytest.mark.parametrize(("trip", "most"), [("task", 14), ("group", 31), ("weight", 16)])
def test_a_trip_does_not_grow(files: dict[str, list[str]], trip: str, most: int) -> None:
    print(f"{trip}: {len(files[trip])} files\n  " + "\n  ".join(files[trip]))
    assert len(files[trip]) <= most, files[trip]
