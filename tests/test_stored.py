"""Training on what an earlier run explored, without any explorer."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.buffer.reader import StoredExperience
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from tests.trainer_and_data import quiet_trainer, stored_data

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = 10


def make_group(key: GroupKey, task_id: str) -> Group:
    turn = Turn((1, 2), (3, 4), (-0.5, -0.25), (0, 1), "stop")
    return Group(key, task_id, tuple(Experience(task_id, sample, (turn,), float(sample)) for sample in range(4)))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A buffer with ten groups to train on, and some that are not."""
    path = tmp_path / "old.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        for number in range(GROUPS + 3):
            key = GroupKey(number // 4, number % 4)
            ledger.issue(key, str(number), epoch=0, explorer=0)
            if number < GROUPS + 2:
                ledger.ready(make_group(key, str(number)))
        ledger.lease([GroupKey(0, slot) for slot in range(4)])
        ledger.trained(0)
        ledger.dropped(GroupKey(2, 2))
        ledger.filtered(GroupKey(2, 3), step=1)
    return path


class Looks(rft.RFTModule):
    """Notes what it was trained on."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.seen: list[list[str]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(sorted(group.task_id for group in batch.groups))
        return super().training_step(batch, batch_idx)


def fit(data: rft.RFTDataModule, model: Path, folder: Path, **settings: Any) -> Looks:
    module = Looks(model)
    ckpt_path, callbacks = settings.pop("ckpt_path", None), settings.pop("callbacks", [])
    trainer = quiet_trainer(folder, *callbacks, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "end.ckpt")
    return module


def test_every_epoch_trains_every_group_once(stored: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    module = fit(stored_data(stored), tiny_model_path, tmp_path, max_epochs=2)
    assert [len(batch) for batch in module.seen] == [4, 4, 2, 4, 4, 2]
    first, second = ([task for batch in module.seen[start : start + 3] for task in batch] for start in (0, 3))
    assert Counter(first) == Counter(second) == Counter(map(str, range(GROUPS)))
    assert first != second
    with Ledger.open(stored) as ledger:  # as it was
        assert len(ledger.trained_tasks()) == 4


def test_the_order_of_an_epoch_is_drawn_once(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, drawn = list(range(GROUPS)), []
    random.Random("1 0").shuffle(order)

    class Counts(random.Random):
        def shuffle(self, x: Any) -> None:
            drawn.append(len(x))
            super().shuffle(x)

    monkeypatch.setattr(random, "Random", Counts)
    source = StoredExperience(stored, tasks_per_step=4, shuffle=True, seed=1, version=lambda: 0)
    seen = [[int(group.task_id) for group in source.wanted(batch)] for batch in (0, 1, 2, 3, 4, 5, 1)]
    assert seen[:3] == [order[:4], order[4:8], order[8:]]  # as ever: runs that resume in mid-epoch go on in it
    assert sorted(place for batch in seen[3:6] for place in batch) == list(range(GROUPS)) and seen[3] != seen[0]
    assert seen[6] == seen[1]
    assert drawn == [GROUPS] * 3


def test_in_order_and_resumed_in_mid_epoch(stored: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    data = stored_data(rft.Buffer(stored, shuffle=False))
    assert fit(data, tiny_model_path, tmp_path, max_steps=2).seen == [list("0123"), list("4567")]
    rest = fit(data, tiny_model_path, tmp_path, max_steps=4, ckpt_path=tmp_path / "end.ckpt")
    assert rest.seen == [list("89"), list("0123")]


def test_what_cannot_work(stored: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"explorers=0 .* set buffer"):
        rft.RFTDataModule(explorers=0)
    with pytest.raises(rft.ConfigurationError, match=r"leave val_tasks out"):
        stored_data(stored, val_tasks=["1 + 1 ="])
    with pytest.raises(rft.ConfigurationError, match=r"no buffer .*nowhere.sqlite"):
        stored_data(tmp_path / "nowhere.sqlite")
    with pytest.raises(rft.ConfigurationError, match="reward is missing"):
        rft.RFTDataModule(tasks=["1 + 1 ="])
    with pytest.raises(rft.ConfigurationError, match="take Synchronous out of"):
        fit(stored_data(stored), tiny_model_path, tmp_path, max_steps=1, callbacks=[rft.Synchronous()])
    empty = tmp_path / "empty.sqlite"
    Ledger.open(empty).close()
    with pytest.raises(rft.ConfigurationError, match="holds no experience"):
        stored_data(empty)


def test_overfitting_trains_the_same_batches_every_epoch(stored: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    module = fit(stored_data(stored), tiny_model_path, tmp_path, max_epochs=3, overfit_batches=2)
    assert module.seen == 3 * module.seen[:2]


def test_an_epoch_that_a_hook_ends_goes_on_in_the_next(
    stored: Path, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(module: Any, batch: Any, batch_idx: int) -> int | None:
        return -1 if (module.trainer.current_epoch, batch_idx) == (0, 1) else None

    monkeypatch.setattr(Looks, "on_train_batch_start", ends)
    data = stored_data(rft.Buffer(stored, shuffle=False))
    seen = fit(data, tiny_model_path, tmp_path, max_epochs=2).seen
    assert seen == [list("0123"), list("4567"), list("89"), list("0123")]
