"""Filter, priority and replay in whole runs, with real processes and an engine that computes nothing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.monitor.spans import Span
from tests.processes import LightEngine
from tests.trainer_and_data import fake_data, quiet_trainer

TASKS = [f"{index} + 1 =" for index in range(12)]
EASY = {"2", "5", "6", "11"}  # every answer to these earns the same

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def explorers() -> Iterator[rft.RFTDataModule]:
    """Its explorers serve all runs of this file."""

    def reward(completion: str, task: rft.Task) -> float:
        return 1.0 if task.id in EASY else float(sum(map(ord, completion)) % 1009)

    with fake_data(
        tasks=TASKS,
        reward=reward,
        engine=LightEngine(mean_tokens=6),
        tasks_per_step=2,
        max_new_tokens=8,
        sampling=rft.Sampling(seed=0),
    ) as data:
        yield data


@pytest.fixture
def data(explorers: rft.RFTDataModule, monkeypatch: pytest.MonkeyPatch) -> rft.RFTDataModule:
    """A datamodule whose settings are a test's own, while its explorers are shared."""
    for name in ("buffer", "task_set", "tasks_per_step", "observers"):
        monkeypatch.setattr(explorers, name, getattr(explorers, name))
    explorers.observers = []
    return explorers


class Watched(rft.RFTModule):
    """Notes the groups of every batch, and how many were logged as replayed."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.batches: list[list[rft.Group]] = []
        self.replayed: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += [[] for _ in range(batch.batch + 1 - len(self.batches))]
        self.batches[batch.batch] += batch.groups if batch.first else []
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.last:
            self.replayed.append(float(self.trainer.callback_metrics["rft/replayed_groups"]))


def fit(
    data: rft.RFTDataModule,
    model: Path,
    folder: Path,
    strategy: rft.SyncStrategy,
    *,
    callbacks: list[L.Callback] | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> Watched:
    module = Watched(model)
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(folder, strategy, checkpoints, *(callbacks or []), **{"max_steps": 4} | settings)
    trainer.fit(module, data, ckpt_path=resume)
    return module


def ended(folder: Path, epoch: int | None = None) -> list[tuple[str, State]]:
    with Ledger.open(folder / "rft" / "buffer.sqlite") as ledger:
        return ledger.ended(epoch)


STRATEGIES: list[Callable[[], rft.SyncStrategy]] = [
    rft.Synchronous,
    rft.OneStepOffPolicy,
    lambda: rft.FullyAsynchronous(max_staleness=3),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_next_task_takes_the_place_of_a_filtered_one(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, strategy: Callable[[], rft.SyncStrategy]
) -> None:
    data.buffer = rft.Buffer(group_filter=rft.has_signal)
    module = fit(data, tiny_model_path, tmp_path, strategy())
    assert [len(batch) for batch in module.batches] == [2] * 4
    assert all(rft.has_signal(group) for batch in module.batches for group in batch)
    outcome = Counter(ended(tmp_path))
    assert max(outcome.values()) == 1  # eight that have signal are not more than an epoch has
    filtered = {task for task, state in outcome if state is State.FILTERED}
    assert filtered == EASY & {task for task, _ in outcome}
    assert len(filtered) >= 3
    assert module.trainer.callback_metrics["rft/filtered_groups"] == len(filtered)
    assert module.trainer.callback_metrics["rft/failed_groups"] == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("step", [1, 3])
def test_a_filtered_task_does_not_come_back_on_resume(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, strategy: Callable[[], rft.SyncStrategy], step: int
) -> None:
    data.buffer = rft.Buffer(group_filter=rft.has_signal)
    fit(data, tiny_model_path, tmp_path, strategy(), max_steps=3)
    assert State.FILTERED in dict(ended(tmp_path)).values()
    fit(data, tiny_model_path, tmp_path, strategy(), max_steps=5, resume=tmp_path / f"step={step}.ckpt")
    expected = {str(task): State.FILTERED if str(task) in EASY else State.TRAINED for task in range(12)}
    assert sorted(ended(tmp_path, epoch=0)) == sorted(expected.items())  # each once


def test_an_exception_in_the_filter_ends_the_run_as_itself(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    def group_filter(group: rft.Group) -> bool:
        raise LookupError(f"no opinion on {group.task_id}")

    data.buffer = rft.Buffer(group_filter=group_filter)
    with pytest.raises(LookupError, match="no opinion on"):
        fit(data, tiny_model_path, tmp_path, rft.Synchronous())


def test_a_filter_that_keeps_nothing_ends_the_run(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    data.buffer = rft.Buffer(group_filter=lambda group: False, max_refused=30)
    with pytest.raises(rft.ConfigurationError, match=r"refused 32 samples in a row, more than Buffer\(max_refused=30"):
        fit(data, tiny_model_path, tmp_path, rft.FullyAsynchronous())


def test_a_filter_that_hangs_ends_the_run_and_shows_its_line(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def group_filter(group: rft.Group) -> bool:
        return ended.wait(60)  # the line that hangs

    data.buffer = rft.Buffer(group_filter=group_filter)
    monkeypatch.setattr(data, "timeouts", rft.Timeouts(progress_s=1))
    with pytest.raises(rft.DeadlineError, match=r"(?s)rank 0 was busy for .*progress_s=1.*# the line that hangs"):
        fit(data, tiny_model_path, tmp_path, rft.Synchronous())
    ended.set()


class Patience(L.Callback):
    """Has the first step wait until as many groups have come back as were asked for with the first weights."""

    def __init__(self, data: rft.RFTDataModule, groups: int) -> None:
        self._groups = threading.Semaphore(0)
        self._wanted = groups
        data.observers.append(self._observe)

    def _observe(self, span: Span) -> None:
        if span.what == "put":
            self._groups.release()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        if batch.batch == 0:
            for _ in range(self._wanted):
                assert self._groups.acquire(timeout=30)


@pytest.mark.parametrize("liked", [1.0, -1.0, None])
def test_the_highest_score_is_trained_first(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, liked: float | None
) -> None:
    data.task_set, data.tasks_per_step = rft.TaskSet(TASKS, shuffle=False), 1
    if liked is not None:
        data.buffer = rft.Buffer(selection=rft.Priority(lambda group: liked * float(group.task_id)))
    strategy = rft.FullyAsynchronous(max_staleness=5)  # six groups of version 0
    module = fit(data, tiny_model_path, tmp_path, strategy, callbacks=[Patience(data, 6)], max_steps=6)
    tasks = [int(group.task_id) for (group,) in module.batches][1:]  # the first is whichever was there first
    # all six are due by step 5, so nothing newer comes between
    assert tasks == sorted(tasks, reverse=liked == 1.0)
    assert {task for task, _ in ended(tmp_path)} >= set("012345")


def test_what_is_resumed_has_scores_too(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    data.task_set, data.tasks_per_step = rft.TaskSet(TASKS, shuffle=False), 1
    data.buffer = rft.Buffer(selection=rft.Priority(lambda group: float(group.task_id)))

    def strategy() -> rft.SyncStrategy:
        return rft.FullyAsynchronous(max_staleness=5)

    fit(data, tiny_model_path, tmp_path, strategy(), callbacks=[Patience(data, 6)], max_steps=6)
    # the other five were ready when version 1 was saved
    scored: list[str] = []

    def score(group: rft.Group) -> float:
        scored.append(group.task_id)
        return -float(group.task_id)

    data.buffer = rft.Buffer(selection=rft.Priority(score))
    module = fit(data, tiny_model_path, tmp_path, strategy(), max_steps=6, resume=tmp_path / "step=1.ckpt")
    tasks = [int(group.task_id) for batch in module.batches[1:] for group in batch]
    assert tasks == sorted(tasks)
    assert sorted(map(int, scored)) == tasks


def test_a_score_that_is_not_finite_ends_the_run(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    def unsure(group: rft.Group) -> float:
        return float("nan")

    data.buffer = rft.Buffer(selection=rft.Priority(unsure))
    with pytest.raises(rft.ConfigurationError, match=r"Priority\(score=.*unsure\) returned nan"):
        fit(data, tiny_model_path, tmp_path, rft.FullyAsynchronous())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_groups_come_along_once_more(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, accumulate: int
) -> None:
    data.buffer = rft.Buffer(replay=rft.Replay(times=2))
    strategy = rft.Synchronous(sync_interval=3)  # batches 0 to 2 are of version 0, 3 to 5 of version 3
    module = fit(data, tiny_model_path, tmp_path, strategy, max_steps=6, accumulate_grad_batches=accumulate)
    batches = [sorted(tuple(group.key) for group in batch) for batch in module.batches]
    fresh = [[(batch, 0), (batch, 1)] for batch in range(6)]
    assert batches == [
        fresh[0],
        [(0, 0), *fresh[1]],
        [(0, 1), *fresh[2]],
        fresh[3],
        [(3, 0), *fresh[4]],
        [(3, 1), *fresh[5]],
    ]
    assert module.replayed == [0, 1, 1, 0, 1, 1]
    with Ledger.open(tmp_path / "rft" / "buffer.sqlite") as ledger:
        assert Counter(ledger.trained_tasks()) == Counter(map(str, range(12)))
        assert ledger.counts()[State.TRAINED] == sum(ledger.counts().values()) == 12


@pytest.mark.parametrize("strategy", [rft.OneStepOffPolicy, lambda: rft.FullyAsynchronous(max_staleness=2)])
def test_replays_keep_the_bound(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, strategy: Callable[[], rft.SyncStrategy]
) -> None:
    data.buffer = rft.Buffer(replay=rft.Replay(times=3, groups=4))
    module = fit(data, tiny_model_path, tmp_path, strategy(), max_steps=6)
    trainings = Counter(group.key for batch in module.batches for group in batch)
    assert 2 <= max(trainings.values()) <= 3
    assert len(trainings) == 12
    assert [len(batch) - 2 for batch in module.batches] == module.replayed
    bound = strategy().max_staleness
    assert all(0 <= b - group.oldest_version <= bound for b, batch in enumerate(module.batches) for group in batch)


def test_an_epoch_is_resumed_with_no_replay_left(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    data.buffer = rft.Buffer(replay=rft.Replay())
    fit(data, tiny_model_path, tmp_path, rft.Synchronous(sync_interval=3), max_steps=2)
    saved = tmp_path / "step=1.ckpt"
    module = fit(data, tiny_model_path, tmp_path, rft.Synchronous(sync_interval=3), max_steps=3, resume=saved)
    assert module.replayed == [0, 1]
