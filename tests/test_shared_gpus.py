"""Whole fits in which trainer and explorers take turns, as on GPUs that they share."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft
from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.placement import Placement
from lightning_rft.run import session
from lightning_rft.sync.transports.transport import Weights
from lightning_rft.trainer.offload import Offload
from tests.noting import Noting, note, noted
from tests.processes import Script, until
from tests.sync import ipc_on_cpu
from tests.sync.ipc_engine import OnGPU
from tests.trainer_and_data import SUMS, fake_data, pool_of, quiet_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has explorers sleep while the trainer trains, and its optimizer's state move, as if both were on one GPU."""
    plans = session.gpu_placement

    def planned(trainer: L.Trainer, strategy: rft.SyncStrategy, pool: rft.ExplorerPool) -> Placement:
        placed = plans(trainer, strategy, pool)
        pool.engine.sleeps = True
        return placed

    monkeypatch.setattr(session, "gpu_placement", planned)
    monkeypatch.setattr(session, "Offload", partial(Offload, moved=("cpu",)))


class Steps(L.Callback):
    """Notes the trainer's steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        note(self.path, f"train {trainer.global_step}")

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        note(self.path, f"step {trainer.global_step}")


def turn(batch: int) -> list[str]:
    """Batch by batch."""
    return [
        *("explore", "sleep 2", f"train {batch}", f"step {batch}"),
        *("wake weights", f"load {batch + 1}", "wake kv_cache"),
    ]


@pytest.mark.usefixtures("shared")
def test_the_order_of_a_fit(tiny_model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "order"
    data = fake_data(tasks=SUMS[:3], engine=Noting(path), tasks_per_step=1, buffer=":memory:")
    trainer = quiet_trainer(tmp_path, rft.Synchronous(), Steps(path), max_steps=3)
    trainer.fit(rft.RFTModule(tiny_model_path), data)
    assert noted(path) == ["load 0", *turn(0), *turn(1), *turn(2)]
    assert trainer.global_step == 3


@pytest.mark.usefixtures("shared")
def test_validation_in_a_block_of_batches_and_in_the_middle_of_one(tiny_model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "order"
    data = fake_data(
        tasks=SUMS[:2], val_tasks=SUMS[2:4], engine=Noting(path), tasks_per_step=1, buffer=":memory:",
    )  # fmt: skip
    trainer = quiet_trainer(
        tmp_path, rft.Synchronous(2), Steps(path),
        max_epochs=1, accumulate_grad_batches=2, val_check_interval=1, limit_val_batches=None, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(rft.RFTModule(tiny_model_path), data)
    woken = ["wake weights+kv_cache"]
    assert noted(path) == [
        *("load 0", "explore", "sleep 1", "train 0"),
        *(*woken, "explore", "sleep 1", "train 0", "step 0"),  # validation after half of batch 0
        *(*woken, "explore", "sleep 2", "train 1"),  # and after it
        *(*woken, "load 1", "explore", "sleep 2", "train 1", "step 1"),  # which needs weights that were dropped
        *("wake weights", "load 2", "wake kv_cache", "explore"),
    ]


@pytest.mark.usefixtures("shared")
def test_an_explorer_that_is_killed_asleep(tiny_model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "order"

    class Kills(Steps):
        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                (explorer,) = pool.up
                os.kill(pool.pid(explorer), signal.SIGKILL)
                until(lambda: not pool.up, "the explorer's end")
                due = time.monotonic() + 1  # a restart would have begun
                until(lambda: time.monotonic() > due, "its restart")
                assert not pool.coming_up
            super().on_before_optimizer_step(trainer)

    explorers = rft.ExplorerPool(Noting(path), max_restarts=1)
    data = fake_data(tasks=SUMS[:3], explorers=explorers, tasks_per_step=1, buffer=":memory:")
    pool = pool_of(data)
    trainer = quiet_trainer(tmp_path, rft.Synchronous(), Kills(path), max_steps=3)
    trainer.fit(rft.RFTModule(tiny_model_path), data)
    assert noted(path) == ["load 0", *turn(0), *turn(1)[:4], "load 2", *turn(2)]
    assert trainer.global_step == 3


@pytest.mark.usefixtures("shared")
def test_the_same_explorers_validate_fit_and_fit_again(tiny_model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "order"
    data = fake_data(tasks=SUMS[:1], val_tasks=SUMS[2:4], engine=Noting(path), tasks_per_step=1, buffer=":memory:")
    module = rft.RFTModule(tiny_model_path)

    def trainer(strategy: rft.SyncStrategy, **settings: Any) -> L.Trainer:
        return quiet_trainer(tmp_path, strategy, Steps(path), max_steps=1, **settings)

    with data:
        trainer(rft.OneStepOffPolicy(), limit_val_batches=None).validate(
            module, data, verbose=False
        )  # which trains nothing
        with pytest.raises(ConfigurationError, match="OneStepOffPolicy has both work at the same time"):
            trainer(rft.OneStepOffPolicy()).fit(module, data)
    path.unlink()
    with data:
        trainer(rft.Synchronous()).fit(module, data)
        trainer(rft.Synchronous()).fit(module, data)
    assert noted(path) == ["load 0", *turn(0), "load 0", *turn(0)]


@pytest.mark.usefixtures("shared")
def test_an_interrupt_while_explorers_sleep_ends_all(tiny_model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "order"

    class Interrupts(Steps):
        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            raise KeyboardInterrupt

    data = fake_data(tasks=SUMS[:3], engine=Noting(path), tasks_per_step=1, buffer=":memory:")
    trainer = quiet_trainer(tmp_path, rft.Synchronous(), Interrupts(path), max_steps=3)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(rft.RFTModule(tiny_model_path), data)
    assert noted(path) == ["load 0", "explore", "sleep 2", "train 0"]
    assert not pool_of(data).running


class FromGPU(rft.CollectiveTransport):
    """Pushes weights as if they were on a GPU."""

    def push(self, weights: Weights, *arguments: Any) -> None:
        super().push(replace(weights, device=torch.device("cuda:0")), *arguments)


def test_weights_go_by_cuda_ipc_where_all_share(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    placed = Placement(("0",), (("0",),))
    monkeypatch.setattr(session, "gpu_placement", lambda *_: placed)
    data = fake_data(tasks=SUMS[:3], engine=OnGPU(memory), tasks_per_step=1, buffer=":memory:")
    trainer = quiet_trainer(tmp_path, rft.Synchronous(transport=FromGPU(bucket_mib=1)), max_steps=2)
    module = rft.RFTModule(tiny_model_path)
    with monkeypatch.context() as patch:
        ipc_on_cpu.IPC.put_in_place(patch, "trainer", memory, [0])
        trainer.fit(module, data)
    assert trainer.callback_metrics["rft/push_gap"] < 1e-4  # what the explorer computes with it
    record = [(call.who, call.what) for call in ipc_on_cpu.noted(memory)]
    assert record.count(("explorer", "open")) == record.count(("explorer", "close")) == 3  # one a push
    assert record.count(("trainer", "free")) == record.count(("trainer", "allocate")) == 3


def test_all_ranks_take_turns(start_ranks: Callable[[str], list[Script]]) -> None:
    ranks = start_ranks("""
        from lightning_rft.run import session
        from lightning_rft.trainer.offload import Offload
        from tests.processes import fit

        plans = session.gpu_placement

        def planned(trainer, strategy, pool):
            placed = plans(trainer, strategy, pool)
            pool.engine.sleeps = True
            return placed

        class Noted(Offload):
            def __init__(self, trainer):
                super().__init__(trainer, moved=("cpu",))

            def take(self, turn, **how):
                print(turn.name, flush=True)
                super().take(turn, **how)

        session.gpu_placement, session.Offload = planned, Noted
        print(fit(devices=2, parallel="ddp").global_step)
    """)
    for rank in ranks:
        assert rank.wait() == 0, rank.stderr
        assert rank.stdout.split() == ["EXPLORERS", *["TRAINER", "EXPLORERS"] * 3, "3"]
