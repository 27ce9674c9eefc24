"""A run that goes on from a checkpoint goes on exactly, or says why it cannot."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.buffer.reader import read_buffer
from tests.trainer_and_data import SUMS, quiet_trainer, seeded_data

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(scope="module")
def data() -> Iterator[rft.RFTDataModule]:
    """Its explorers serve most of the runs of this file."""
    with seeded_data() as data:
        yield data


def train(
    folder: Path,
    model: Path,
    *,
    steps: int = 6,
    resume: str | Path | None = None,
    strategy: rft.SyncStrategy | None = None,
    trainer: dict[str, Any] | None = None,
    module: type[rft.RFTModule] = rft.RFTModule,
    data: rft.RFTDataModule | None = None,
    **changes: Any,
) -> rft.RFTModule:
    trained = module(model)
    checkpoints = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}", save_last=True)
    quiet_trainer(folder, strategy or rft.Synchronous(), checkpoints, max_steps=steps, **trainer or {}).fit(
        trained, data or seeded_data(**changes), ckpt_path=resume
    )
    return trained


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step={step}.ckpt"


def trained_tasks(folder: Path) -> list[str]:
    with Ledger.open(folder / "rft" / "buffer.sqlite") as ledger:
        return ledger.trained_tasks()


def attempts(folder: Path) -> int:
    """How often groups were issued."""
    rows = {(row["batch"], row["slot"]): row["attempts"] for row in read_buffer(folder / "rft" / "buffer.sqlite")}
    return sum(rows.values())


@contextmanager
def warned(text: str) -> Iterator[None]:
    """Expects one warning, and minds no others."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    assert sum(text in str(warning.message) for warning in found) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bit_for_bit(tmp_path: Path, tiny_model_path: Path, accumulate: int) -> None:
    """With dropout, so that the trainer's random numbers matter, and cut in the middle of an epoch and at its end.

    The engine runs one sequence at a time: in its last bits a result depends on what is computed beside it.
    """

    class Drops(rft.RFTModule):
        def configure_model(self) -> None:
            super().configure_model()
            for layer in self.policy.model.layers:  # type: ignore[union-attr]
                layer.self_attn.attention_dropout = 0.1

    data = seeded_data(
        engine=rft.TransformersEngine(dtype="float32", max_batch_size=1),
        tolerance=rft.Tolerance(push_gap=10.0),  # what is dropped in training is not when sampling
    )

    def run(name: str, steps: int, resume: Path | None = None) -> rft.RFTModule:
        torch.manual_seed(5 if resume is None else 6)  # what is drawn comes from the checkpoint
        return train(
            tmp_path / name,
            tiny_model_path,
            steps=steps,
            resume=resume,
            module=Drops,
            trainer={"accumulate_grad_batches": accumulate},
            data=data,
        )

    with data:
        whole = run("whole", 6)
        for half in (2, 3):
            run(f"half-{half}", half)
            rest = run(f"half-{half}", 6, checkpoint(tmp_path / f"half-{half}", half))
            assert trained_tasks(tmp_path / f"half-{half}") == trained_tasks(tmp_path / "whole")
            for name, weights in whole.state_dict().items():
                assert torch.equal(weights, rest.state_dict()[name]), (half, name)


@pytest.mark.parametrize("cuts", [(3, 4), (3, 5, 6, 7), (2, 3, 6, 8)])
def test_a_run_that_is_resumed_again_and_again_trains_each_task_of_each_epoch_once(
    cuts: tuple[int, ...], tmp_path: Path, tiny_model_path: Path, data: rft.RFTDataModule
) -> None:
    """Also in the epoch after one at whose end it was cut off, of which Lightning does not note that it has begun."""
    for before, step in zip((None, *cuts), (*cuts, -1), strict=True):
        resume = None if before is None else checkpoint(tmp_path, before)
        train(tmp_path, tiny_model_path, steps=step, resume=resume, data=data, trainer={"max_epochs": 3})
    with Ledger.open(tmp_path / "rft" / "buffer.sqlite") as ledger:
        epochs = [sorted(task for task, _ in ledger.ended(epoch)) for epoch in range(4)]
        assert len(ledger.trained_tasks()) == sum(map(len, epochs))
    assert epochs[0] == epochs[1] == epochs[2] and epochs[0] and not epochs[3]


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: rft.Synchronous(2),
        lambda: rft.OneStepOffPolicy(),
        lambda: rft.FullyAsynchronous(max_staleness=3),
    ],
)
def test_an_earlier_checkpoint_takes_back_what_came_after(
    tmp_path: Path, tiny_model_path: Path, data: rft.RFTDataModule, strategy: Any
) -> None:
    train(tmp_path, tiny_model_path, data=data, steps=5, strategy=strategy())
    once = trained_tasks(tmp_path)
    train(tmp_path, tiny_model_path, data=data, steps=6, strategy=strategy(), resume=checkpoint(tmp_path, 2))
    tasks = trained_tasks(tmp_path)
    assert Counter(tasks) == Counter({task: 2 for task in set(tasks)})
    assert len(tasks) == 2 * len(SUMS)
    assert tasks[:8] == once[:8] or strategy().asynchronous
    # what has been taken back cannot be gone on from
    with warned("written on from another checkpoint since"):
        train(tmp_path, tiny_model_path, data=data, steps=6, strategy=strategy(), resume=checkpoint(tmp_path, 5))


def test_what_was_explored_and_not_trained_is_used(
    tmp_path: Path, tiny_model_path: Path, data: rft.RFTDataModule
) -> None:
    train(tmp_path, tiny_model_path, data=data, steps=4)
    # batch 3 was trained after this checkpoint, with the very weights that are in it
    before = attempts(tmp_path)
    train(tmp_path, tiny_model_path, data=data, steps=4, resume=checkpoint(tmp_path, 3))
    assert attempts(tmp_path) == before
    assert len(trained_tasks(tmp_path)) == 14


def test_without_its_buffer_a_run_goes_on_from_the_cursor_and_says_so(
    tmp_path: Path, tiny_model_path: Path, data: rft.RFTDataModule
) -> None:
    train(tmp_path, tiny_model_path, data=data, steps=3)
    first = trained_tasks(tmp_path)
    for file in (tmp_path / "rft").glob("buffer.sqlite*"):
        file.unlink()
    with warned("is not the one that the checkpoint was saved with"):
        train(tmp_path, tiny_model_path, data=data, steps=6, resume=checkpoint(tmp_path, 3))
    assert Counter(trained_tasks(tmp_path)) == Counter(first)  # the second epoch, whole
    assert trained_tasks(tmp_path) != first


def test_with_a_pruned_buffer(
    tmp_path: Path, tiny_model_path: Path, data: rft.RFTDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", tiny_model_path, data=data, steps=6)
    last = trained_tasks(tmp_path / "whole")[-6:]  # of two batches
    monkeypatch.setattr(data, "buffer", rft.Buffer(keep=2))
    train(tmp_path, tiny_model_path, data=data, steps=5)
    before = attempts(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the buffer")
        train(tmp_path, tiny_model_path, data=data, steps=6, resume=checkpoint(tmp_path, 4))
    assert trained_tasks(tmp_path) == last
    assert before == 4 + 4  # batches 3 and 4; the latter was used again, since nothing newer had explored it
    assert attempts(tmp_path) == 4 + 2
    with warned("no longer holds all that was trained since"):
        train(tmp_path, tiny_model_path, data=data, steps=6, resume=checkpoint(tmp_path, 3))
    assert trained_tasks(tmp_path) == last


def test_in_another_log_folder(tmp_path: Path, tiny_model_path: Path, data: rft.RFTDataModule) -> None:
    train(tmp_path / "one", tiny_model_path, data=data, steps=3)
    train(tmp_path / "two", tiny_model_path, data=data, steps=6, resume=checkpoint(tmp_path / "one", 3))
    assert len(trained_tasks(tmp_path / "one")) == 20  # the buffer stays where it is


def test_with_another_strategy(tmp_path: Path, tiny_model_path: Path, data: rft.RFTDataModule) -> None:
    train(tmp_path, tiny_model_path, data=data, steps=4, strategy=rft.FullyAsynchronous(max_staleness=3))
    train(tmp_path, tiny_model_path, data=data, steps=6, resume=checkpoint(tmp_path, 4))
    assert Counter(trained_tasks(tmp_path)) == Counter({task: 2 for task in trained_tasks(tmp_path)})


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("tasks_per_step", {"tasks_per_step": 2}),
        ("seed", {"sampling": rft.Sampling(seed=4)}),
        ("shuffle", {"tasks": rft.TaskSet(SUMS, shuffle=False)}),
        ("tasks", {"tasks": SUMS[:9]}),
        ("samples_per_task", {"samples_per_task": 3}),
    ],
)
def test_settings_that_would_lose_or_repeat_tasks(
    tmp_path: Path, tiny_model_path: Path, setting: str, changes: dict[str, Any]
) -> None:
    train(tmp_path, tiny_model_path, steps=2)
    with pytest.raises(rft.ConfigurationError, match=f"^{setting}.* in the checkpoint"):
        train(tmp_path, tiny_model_path, resume=checkpoint(tmp_path, 2), **changes)


def test_a_checkpoint_saved_after_fit(tmp_path: Path, tiny_model_path: Path) -> None:
    data = seeded_data(val_tasks=["2 + 2 ="])
    settings: dict[str, Any] = {"num_sanity_val_steps": 0, "limit_val_batches": None}
    trainer = quiet_trainer(tmp_path, rft.Synchronous(), max_steps=2, **settings)
    module = rft.RFTModule(tiny_model_path)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)  # which is not what the checkpoint is of
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    quiet_trainer(tmp_path, rft.Synchronous(), max_steps=3, **settings).fit(
        rft.RFTModule(tiny_model_path), data, ckpt_path=tmp_path / "late.ckpt"
    )
    assert Counter(trained_tasks(tmp_path)) == Counter(map(str, range(10)))
