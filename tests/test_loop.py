"""Whole runs: real processes, a real Lightning trainer, an engine that computes nothing."""

from __future__ import annotations

import csv
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.sync.transports.collective import CollectiveTransport
from tests.processes import LightEngine
from tests.trainer_and_data import SUMS, fake_data, pool_of, quiet_trainer

SIZES = [4, 4, 2]  # groups of the batches of an epoch
VAL_TASKS = [rft.Task(f"{index} + 2 =", answer=1.0 if index < 8 else 0.5) for index in range(10)]


pytestmark = pytest.mark.usefixtures("one_thread")


def make_data(**changes: Any) -> rft.RFTDataModule:
    settings: dict[str, Any] = {
        "reward": lambda completion, task: float(len(completion) % 3) if task.answer is None else task.answer,
        "engine": rft.FakeEngine(mean_tokens=4),
        "val_tasks": VAL_TASKS,
    }
    return fake_data(**settings | changes)


@pytest.fixture(scope="module")
def data() -> Iterator[rft.RFTDataModule]:
    """Its explorers serve all runs of this file, which is a test in itself."""
    with make_data() as data:
        yield data


@dataclass
class Run:
    """A trainer and all that is told of it: what the loader asked for, what explorers loaded, what was trained."""

    folder: Path
    trainer: L.Trainer
    module: rft.RFTModule
    events: list[tuple[Any, ...]] = field(default_factory=list)

    def fit(self, data: rft.RFTDataModule) -> Run:
        begin = data.begin

        def begin_watched(strategy: rft.SyncStrategy) -> None:
            begin(strategy)
            run = data._active.coordinator
            if "wanted" in vars(run):  # every hook that may be the first begins the run
                return
            wanted = run.wanted

            def wanted_watched(batch: int) -> Any:
                self.events.append(("wanted", batch))
                return wanted(batch)

            run.wanted = wanted_watched  # type: ignore[method-assign]

        data.begin = begin_watched  # type: ignore[method-assign]
        try:
            self.trainer.fit(self.module, data)
        finally:
            data.begin = begin  # type: ignore[method-assign]
        return self

    def sql(self, query: str) -> list[Any]:
        connection = sqlite3.connect(self.folder / "rft" / "buffer.sqlite")
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()

    @property
    def trained_tasks(self) -> list[str]:
        with Ledger.open(self.folder / "rft" / "buffer.sqlite") as ledger:
            return ledger.trained_tasks()


class WatchedTransport(CollectiveTransport):
    def __init__(self, events: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.events = events

    def push(self, weights: Any, version: int, explorers: Any, to: Any = None) -> Any:
        pushed = super().push(weights, version, explorers, to)  # returns once every explorer computes with it
        self.events.append(("loaded", version))
        return pushed


class WatchedModule(rft.RFTModule):
    events: list[tuple[Any, ...]]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        experiences = [experience for group in batch.groups for experience in group.experiences]
        versions = {v for experience in experiences for turn in experience.turns for v in turn.versions}
        self.events.append(("trained", batch.batch, versions))
        return super().training_step(batch, batch_idx)


def make_run(
    folder: Path,
    model: Path,
    *,
    k: int = 1,
    module: WatchedModule | None = None,
    settings: dict[str, Any] | None = None,
) -> Run:
    events: list[tuple[Any, ...]] = []
    settings = {"max_epochs": 1, "num_sanity_val_steps": 0} | (settings or {})
    strategy = rft.Synchronous(k, transport=WatchedTransport(events))
    trainer = quiet_trainer(folder, strategy, *settings.pop("callbacks", []), **settings)
    module = module or WatchedModule(model)
    module.events = events
    return Run(folder, trainer, module, events)


def expected_events(shares: list[list[int]], k: int, first: int = 0) -> list[tuple[Any, ...]]:
    """What must happen, in this order: ``shares`` has for each batch how many groups each of its micro-batches has."""
    events: list[tuple[Any, ...]] = [("loaded", first)]
    for batch, parts in enumerate(shares, start=first):
        version = max(first, batch // k * k)
        events.append(("wanted", batch))
        events += [("trained", batch, {version} if sum(parts) else set()) for _ in parts]  # each has the whole batch
        if (batch + 1) % k == 0:
            events.append(("loaded", batch + 1))
    end = first + len(shares)
    return events if events[-1] == ("loaded", end) else [*events, ("loaded", end)]


MATRIX: dict[str, tuple[int, dict[str, Any], list[list[int]]]] = {
    # name: (sync_interval, settings of the trainer, groups of each micro-batch of each batch)
    "plain": (1, {}, [[4], [4], [2]]),
    "sync_interval 2": (2, {"max_epochs": 2}, [[4], [4], [2]] * 2),
    "sync_interval 4": (4, {"max_epochs": 2}, [[4], [4], [2]] * 2),
    "validation": (1, {"max_epochs": 2, "num_sanity_val_steps": 2, "limit_val_batches": 1.0}, [[4], [4], [2]] * 2),
    "validation, sync_interval 2": (2, {"limit_val_batches": 1, "val_check_interval": 1}, [[4], [4], [2]]),
    "accumulate 2": (1, {"accumulate_grad_batches": 2, "max_epochs": 2}, [[2, 2], [2, 2], [1, 1]] * 2),
    "accumulate 3": (1, {"accumulate_grad_batches": 3}, [[1, 1, 2], [1, 1, 2], [1, 1, 0]]),
    "accumulate 4": (1, {"accumulate_grad_batches": 4}, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]),
    "accumulate 2, sync_interval 2": (2, {"accumulate_grad_batches": 2}, [[2, 2], [2, 2], [1, 1]]),
    "fast_dev_run": (1, {"fast_dev_run": True}, [[4]]),
    "fast_dev_run, accumulate 2": (1, {"fast_dev_run": True, "accumulate_grad_batches": 2}, [[4]]),
    "fast_dev_run 3, accumulate 2": (1, {"fast_dev_run": 3, "accumulate_grad_batches": 2}, [[2, 2], [4]]),
    "limit 2": (1, {"limit_train_batches": 2, "max_epochs": 2}, [[4], [4]] * 2),
    "limit 3, accumulate 2": (
        1,
        {"limit_train_batches": 3, "accumulate_grad_batches": 2, "max_epochs": 2},
        [[2, 2], [4]] * 2,
    ),
    "limit 5, accumulate 3": (1, {"limit_train_batches": 5, "accumulate_grad_batches": 3}, [[1, 1, 2], [2, 2]]),
    "limit 0.7": (1, {"limit_train_batches": 0.7}, [[4], [4]]),
    "limit 0.5, accumulate 2": (1, {"limit_train_batches": 0.5, "accumulate_grad_batches": 2}, [[2, 2], [4]]),
    "max_steps 2": (1, {"max_steps": 2, "max_epochs": None}, [[4], [4]]),
    "max_steps 4": (1, {"max_steps": 4, "max_epochs": None}, [[4], [4], [2], [4]]),
    "max_steps 4, accumulate 2, sync_interval 3": (
        3,
        {"max_steps": 4, "max_epochs": None, "accumulate_grad_batches": 2},
        [[2, 2], [2, 2], [1, 1], [2, 2]],
    ),
}


@pytest.mark.parametrize("case", MATRIX)
def test_batches_are_fetched_loaded_and_trained_in_order(
    case: str, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    k, settings, shares = MATRIX[case]
    run = make_run(tmp_path, tiny_model_path, k=k, settings=settings).fit(data)
    assert run.events == expected_events(shares, k)
    assert run.trainer.global_step == len(shares)
    check_buffer(run, shares, k)


def check_buffer(run: Run, shares: list[list[int]], k: int, incarnation: int = 1, first: int = 0) -> None:
    sizes = [sum(parts) for parts in shares]
    mine = f"WHERE incarnation = {incarnation}"
    assert run.sql(f"SELECT state, count(*) FROM groups {mine} GROUP BY state") == [("trained", sum(sizes))]
    rows = run.sql(
        f"SELECT batch, step, count(*), min(oldest_version) FROM groups {mine} GROUP BY batch ORDER BY batch"
    )
    assert rows == [(batch, batch, size, max(first, batch // k * k)) for batch, size in enumerate(sizes, start=first)]
    for (epoch,) in run.sql(f"SELECT DISTINCT epoch FROM groups {mine}"):
        tasks = Counter(task for (task,) in run.sql(f"SELECT task_id FROM groups {mine} AND epoch = {epoch}"))
        assert max(tasks.values()) == 1
        assert len(tasks) <= len(SUMS)


def test_every_epoch_trains_every_task_once_in_an_order_of_its_own(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    tasks = make_run(tmp_path, tiny_model_path, settings={"max_epochs": 2}).fit(data).trained_tasks
    first, second = tasks[:10], tasks[10:]
    assert sorted(first) == sorted(second) == sorted(map(str, range(10)))
    assert first != second


def test_fit_again_with_more_epochs(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path, k=2).fit(data)
    first = list(run.events)
    run.events.clear()
    run.trainer.fit_loop.max_epochs = 3
    run.fit(data)
    assert run.trainer.global_step == 9
    shares = [[size] for size in SIZES]
    assert first == expected_events(shares, k=2)
    assert run.events == expected_events(shares * 2, k=2, first=3)
    check_buffer(run, shares, k=2, incarnation=1)
    check_buffer(run, shares * 2, k=2, incarnation=2, first=3)
    assert run.sql("SELECT DISTINCT incarnation, epoch FROM groups ORDER BY 1, 2") == [(1, 0), (2, 1), (2, 2)]


def test_fit_again_with_a_new_trainer(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path).fit(data)
    assert isinstance(run.module, WatchedModule)
    policy = run.module.policy
    again = make_run(tmp_path, tiny_model_path, module=run.module, settings={"accumulate_grad_batches": 2}).fit(data)
    assert run.module.policy is policy
    assert again.trainer.global_step == 3
    assert again.events == expected_events([[2, 2], [2, 2], [1, 1]], k=1)
    check_buffer(run, [[4], [4], [2]], k=1, incarnation=1)
    check_buffer(again, [[2, 2], [2, 2], [1, 1]], k=1, incarnation=2)


def test_fit_again_after_max_steps_in_mid_epoch(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path, settings={"max_steps": 2, "max_epochs": None}).fit(data)
    run.events.clear()
    run.trainer.fit_loop.epoch_loop.max_steps = 6
    run.fit(data)
    assert run.trainer.global_step == 6
    assert [event for event in run.events if event[0] == "wanted"] == [("wanted", batch) for batch in (2, 3, 4, 5)]
    assert all(event[2] == {event[1]} for event in run.events if event[0] == "trained")
    assert run.sql("SELECT DISTINCT state FROM groups") == [("trained",)]
    # Lightning takes the epoch that was cut for a whole one
    epochs = run.sql("SELECT epoch, count(DISTINCT task_id), count(*) FROM groups GROUP BY epoch ORDER BY epoch")
    assert epochs == [(0, 8, 8), (1, 10, 10), (2, 4, 4)]


def test_fit_again_after_an_error_in_mid_epoch(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                trainer.callbacks.remove(self)  # type: ignore[attr-defined]
                raise ZeroDivisionError

    run = make_run(tmp_path, tiny_model_path)
    run.trainer.callbacks.append(Fails())  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        run.fit(data)
    run.fit(data)  # Lightning begins the epoch anew
    assert run.trainer.global_step == 1 + len(SIZES)
    assert run.sql("SELECT count(DISTINCT task_id), count(*) FROM groups WHERE incarnation = 2") == [(10, 10)]


# Validation


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_validation_alone(precision: str, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path, settings={"limit_val_batches": 1.0, "precision": precision})
    (metrics,) = run.trainer.validate(run.module, data, verbose=False)
    scores = {name: metrics.pop(f"val/{name}") for name in ("reward", "pass_at_1", "pass@1", "version")}
    assert scores == pytest.approx({"reward": 0.9, "pass_at_1": 0.8, "pass@1": 0.8, "version": 0.0})
    assert metrics.keys() == {"val/completion_length", "val/truncated_share"}
    assert run.events == [("loaded", 0)]
    assert run.sql("SELECT count(*) FROM groups") == [(0,)]
    limited = make_run(tmp_path, tiny_model_path, settings={"limit_val_batches": 1})
    (metrics,) = limited.trainer.validate(run.module, data, verbose=False)
    assert metrics["val/reward"] == 1.0


def test_validation_in_fit_uses_the_version_that_is_loaded(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    settings = {"limit_val_batches": 1.0, "logger": CSVLogger(tmp_path), "max_epochs": 2}
    run = make_run(tmp_path, tiny_model_path, k=2, settings=settings).fit(data)
    logged = [row for row in read_csv(run.trainer) if row["val/version"]]
    assert [(row["step"], row["val/version"]) for row in logged] == [("2", "2.0"), ("5", "6.0")]
    for row in logged:
        assert float(row["val/reward"]) == pytest.approx(0.9)
        assert float(row["val/pass@1"]) == pytest.approx(0.8)


def test_explorers_live_as_long_as_they_are_held(tiny_model_path: Path, tmp_path: Path) -> None:
    data = make_data(engine=LightEngine())
    assert not pool_of(data).running

    def validate() -> None:
        run = make_run(tmp_path, tiny_model_path, settings={"limit_val_batches": 1})
        run.trainer.validate(run.module, data, verbose=False)

    pids = []
    with data:
        validate()
        pids.append(explorers(data))
        make_run(tmp_path, tiny_model_path).fit(data)
        pids.append(explorers(data))
        validate()
        pids.append(explorers(data))
        assert all(map(alive, pids[0]))
    assert len(pids[0]) == 1
    assert pids[0] == pids[1] == pids[2]
    assert not pool_of(data).running
    assert not any(map(alive, pids[0]))


def test_slots_do_not_idle_while_groups_wait(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(LightEngine):
        """Writes down how many of its slots are busy in each step."""

        def step(self) -> Any:
            with open("busy.txt", "a") as busy:
                print(min(len(self._running), self.max_num_seqs), file=busy)
            return super().step()

    monkeypatch.chdir(tmp_path)  # explorers begin there
    slots, engine = 8, Narrow(tokens_per_second=100.0, mean_tokens=20, max_num_seqs=8)
    data = make_data(engine=engine, tasks_per_step=10, samples_per_task=slots + 1, max_new_tokens=80)
    make_run(tmp_path, tiny_model_path, settings={"max_steps": 1}).fit(data)
    busy = list(map(int, (tmp_path / "busy.txt").read_text().split()))
    full = busy[: len(busy) - busy[::-1].index(slots)]  # until nothing waits any more
    assert len(full) > len(busy) / 2
    assert sum(full) >= 0.8 * slots * len(full)  # 0.95 on two cores beside much else


def test_two_explorers_share_the_work_and_end_with_fit(tiny_model_path: Path, tmp_path: Path) -> None:
    data = make_data(engine=LightEngine(), explorers=2)
    pids = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pids.extend(explorers(data))

    run = make_run(tmp_path, tiny_model_path, settings={"callbacks": [Look()]}).fit(data)
    assert run.events == expected_events([[4], [4], [2]], k=1)
    assert run.sql("SELECT explorer, count(*) FROM groups GROUP BY explorer") == [(0, 5), (1, 5)]
    assert len(set(pids)) == 2
    assert not pool_of(data).running
    assert not any(map(alive, pids))


def explorers(data: rft.RFTDataModule) -> list[int]:
    pool = pool_of(data)
    return [pool.pid(explorer) for explorer in pool.up]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Lightning's own things


METRICS = [
    *("loss", "reward", "reward_std", "completion_length", "entropy", "clip_fraction", "kl", "correction"),
    *("staleness_mean", "staleness_max", "tokens_per_second", "wait_experience_s", "sync_s", "version"),
    "weights_changed",
]


def read_csv(trainer: L.Trainer) -> list[dict[str, str]]:
    for logger in trainer.loggers:
        logger.save()
    with open(Path(trainer.log_dir or "") / "metrics.csv") as lines:
        return list(csv.DictReader(lines))


def test_metrics_of_every_batch_are_logged(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    settings = {"logger": CSVLogger(tmp_path), "max_epochs": 2, "accumulate_grad_batches": 2}
    run = make_run(tmp_path, tiny_model_path, k=2, settings=settings).fit(data)
    rows = read_csv(run.trainer)
    assert [row["step"] for row in rows] == list("012345")
    values = [{name: row[f"rft/{name}"] for name in METRICS} for row in rows]
    pushed = [value.pop("weights_changed") for value in values]
    numbers = [{name: float(text) for name, text in value.items()} for value in values]  # none is missing
    assert [value["version"] for value in numbers] == [1, 2, 3, 4, 5, 6]
    assert [value["staleness_mean"] for value in numbers] == [value["staleness_max"] for value in numbers]
    assert [value["staleness_max"] for value in numbers] == [0, 1, 0, 1, 0, 1]
    assert [value["sync_s"] > 0 for value in numbers] == [False, True] * 3
    assert pushed[0] == ""
    assert 0 < float(pushed[1]) <= 1
    folder = Path(run.trainer.log_dir or "") / "rft"
    connection = sqlite3.connect(folder / "buffer.sqlite")
    stored = connection.execute(
        "SELECT avg(reward), avg(num_tokens) FROM experiences GROUP BY batch ORDER BY batch"
    ).fetchall()
    connection.close()
    for value, (reward, length) in zip(numbers, stored, strict=True):
        assert value["reward"] == pytest.approx(reward)
        assert value["completion_length"] == pytest.approx(length)
        assert 0 < value["entropy"] < 5
        assert value["kl"] > 0  # uniform samples, trained on by a model that is not
        assert 0 < value["correction"] <= 2  # which takes the place of clipping where a push is for two batches
        assert value["clip_fraction"] == 0
        assert 0 < value["reward_std"] < 2
        assert value["tokens_per_second"] > 0
        assert value["wait_experience_s"] >= 0


def test_what_is_logged_does_not_depend_on_accumulation(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    logged = []
    for accumulate in (1, 2, 4):
        settings = {"accumulate_grad_batches": accumulate, "max_steps": 1, "max_epochs": None}
        run = make_run(tmp_path / str(accumulate), tiny_model_path, settings=settings).fit(data)
        timed = ("_s", "per_second")
        values = run.trainer.callback_metrics.items()
        metrics = {name: float(value) for name, value in values if not name.endswith(timed)}
        logged.append(metrics)
    assert logged[0]["rft/loss"] != 0
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)
    assert logged[2] == pytest.approx(logged[0], rel=1e-4)


def test_clipping_scheduler_and_checkpoints_work_as_usual(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    clip, rate = 1e-3, 0.5
    weights: list[torch.Tensor] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            weights.append(torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach())

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch.last:
                self.on_train_start(trainer, pl_module)

    module = WatchedModule(
        tiny_model_path,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    )
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1, save_last=True)
    settings = {
        "callbacks": [checkpoints, Look()],
        "enable_checkpointing": True,
        "gradient_clip_val": clip,
        "accumulate_grad_batches": 2,
        "max_epochs": 2,
    }
    make_run(tmp_path, tiny_model_path, module=module, settings=settings).fit(data)

    steps = [float((after - before).norm()) for before, after in pairwise(weights)]
    assert steps == pytest.approx([clip * rate / 2**step for step in range(6)], rel=1e-2)

    saved = sorted((tmp_path / "checkpoints").glob("epoch*.ckpt"))
    assert len(saved) == 3
    for path, step in zip(saved, (2, 4, 6), strict=True):
        loaded = rft.RFTModule.load_from_checkpoint(path, model=tiny_model_path, weights_only=False)
        assert torch.equal(torch.nn.utils.parameters_to_vector(loaded.parameters()), weights[step])
        plain = rft.RFTModule(tiny_model_path)
        plain.configure_model()
        plain.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
        assert torch.equal(torch.nn.utils.parameters_to_vector(plain.parameters()), weights[step])
