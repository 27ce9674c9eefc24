"""Validation in real runs: sets by name, several samples, and what of Lightning looks at the metrics."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_rft as rft
from lightning_rft.run.validation import Validation
from tests.trainer_and_data import fake_data, quiet_trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

EASY = [rft.Task(f"{index} + 2 =", answer=1.0) for index in range(3)]
HARD = [rft.Task(f"{index} + 3 =", answer=0.25) for index in range(5)]
ONE = {"reward", "pass_at_1", "completion_length", "truncated_share", "version"}
TWO = ONE | {"pass_at_2", "avg_at_2", "maj_at_2"}


@pytest.fixture(scope="module")
def data() -> Iterator[rft.RFTDataModule]:
    """Two sets with two samples of each task, in items of two tasks; its explorers serve all runs of this file."""

    def reward(completion: str, task: Any) -> float:
        return float(len(completion) % 3) if task.answer is None else float(task.answer)

    settings: dict[str, Any] = {"tasks_per_step": 1, "samples_per_task": 2, "val_samples": 2}
    with fake_data(reward=reward, val_tasks={"easy": EASY, "hard": HARD}, **settings) as data:
        yield data


def names(stage: str, *sets: str, metrics: set[str] = TWO) -> set[str]:
    folders = [stage, *(f"{stage}/{name}" for name in sets)]
    return {f"{folder}/{metric}" for folder in folders for metric in metrics} | {f"{stage}/pass@1"}


class Asked(L.Callback):
    """Notes the sets whose answers come, and how many there are of each task."""

    def __init__(self) -> None:
        self.asked: list[tuple[bool, str, list[int]]] = []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        counts = [len(group.experiences) for group in batch.groups]
        self.asked.append((trainer.sanity_checking, batch.val_set, counts))


def test_callbacks_see_the_metrics_of_sets_and_of_all(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    asked = Asked()
    stops = EarlyStopping("val/hard/reward", mode="max", patience=1, strict=True)
    saves = ModelCheckpoint(tmp_path, monitor="val/reward", mode="max", filename="best", save_top_k=1)
    trainer = quiet_trainer(
        tmp_path, rft.Synchronous(), asked, stops, saves, logger=CSVLogger(tmp_path),
        limit_val_batches=1.0, num_sanity_val_steps=1, val_check_interval=3, max_epochs=4,
    )  # fmt: skip
    trainer.fit(rft.RFTModule(tiny_model_path), data)
    sanity = [(True, "easy", [2, 2]), (True, "hard", [2, 2])]
    whole = [("easy", [2, 2]), ("easy", [2]), ("hard", [2, 2]), ("hard", [2, 2]), ("hard", [2])]
    assert asked.asked == sanity + 2 * [(False, *item) for item in whole]
    assert trainer.global_step == 6, "the second validation is no better than the first"
    assert float(saves.best_model_score) == pytest.approx((3 * 1.0 + 5 * 0.25) / 8)
    assert Path(saves.best_model_path).name == "best.ckpt"
    with open(Path(trainer.logger.log_dir) / "metrics.csv", newline="") as file:  # type: ignore[union-attr, arg-type]
        logged = [row for row in csv.DictReader(file) if row["val/reward"]]
    assert [(row["val/version"], row["val/easy/reward"], row["val/hard/pass_at_2"]) for row in logged] == [
        ("3.0", "1.0", "0.0"), ("6.0", "1.0", "0.0")
    ]  # fmt: skip
    assert {name for name in trainer.callback_metrics if name.startswith("val/")} == names("val", "easy", "hard")


def test_validate_and_test_return_the_metrics_of_all_with_the_last_set(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    class Looks(L.Callback):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            looked.append(float(trainer.callback_metrics["val/reward"]))

    looked: list[float] = []
    trainer = quiet_trainer(tmp_path, rft.Synchronous(), Looks(), limit_val_batches=1)
    module = rft.RFTModule(tiny_model_path)
    easy, hard = trainer.validate(module, data, verbose=False)
    assert easy.keys() == {f"val/easy/{metric}" for metric in TWO}
    assert hard.keys() == names("val", "hard")
    assert hard["val/reward"] == pytest.approx((2 * 1.0 + 2 * 0.25) / 4)  # an item of each set
    assert looked == [hard["val/reward"]]
    easy, hard = trainer.test(module, data, verbose=False)
    assert easy.keys() | hard.keys() == names("test", "easy", "hard")
    assert hard["test/pass_at_1"] == hard["test/maj_at_2"] == hard["test/pass@1"] == pytest.approx(3 / 8)
    assert hard["test/hard/completion_length"] > 0


def test_what_failed_is_left_out(tiny_model_path: Path, tmp_path: Path) -> None:
    def reward(completion: str, task: Any) -> float:
        if task.answer is None:
            raise ValueError("no answer")
        return float(task.answer)

    data = fake_data(
        reward=reward, val_tasks=[*EASY, "fails"], tolerance=rft.Tolerance(retries=0, max_error_rate=1.0), tasks=EASY
    )
    trainer = quiet_trainer(tmp_path, rft.Synchronous(), limit_val_batches=1.0)
    (metrics,) = trainer.validate(rft.RFTModule(tiny_model_path), data, verbose=False)
    assert metrics.keys() == names("val", metrics=ONE)
    assert metrics["val/reward"] == 1.0


def test_answers_are_compared_as_the_module_says(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    seen: list[str] = []

    def first_letter(text: str) -> str:
        seen.append(text)
        return text[:1]

    trainer = quiet_trainer(tmp_path, rft.Synchronous(), limit_val_batches=1.0)
    trainer.validate(rft.RFTModule(tiny_model_path, final_answer=first_letter), data, verbose=False)
    assert len(seen) == 16


def test_every_task_has_random_numbers_of_its_own() -> None:
    def seeds(count: int, **changes: Any) -> list[tuple[int, ...]]:
        tasks = [rft.Task("?", id=str(index)) for index in range(count)]
        sampling = rft.Sampling(max_new_tokens=4, temperature=1.0, seed=0)
        validation = Validation(tasks, run=1, samples=3, sampling=replace(sampling, **changes))
        return [question.seeds for question in validation.open(running=set())]

    every = [seed for of_task in seeds(20) for seed in of_task]
    assert len(set(every)) == 60 and min(every) >= 0 and max(every) < 2**31
    assert seeds(5) == seeds(20)[:5]  # whatever tasks are beside it, and in every validation
    assert seeds(5) != seeds(5, seed=1)
