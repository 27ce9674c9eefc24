"""A run that is killed again and again, from inside and from outside, and the explorers it loses. For scripts."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.tasks.sources import as_tasks
from tests.processes import MODEL, LightEngine, touch

TASKS = [f"{index} + 1 =" for index in range(12)]
TASKS_PER_STEP = 3
STRATEGIES: dict[str, dict[str, Any]] = {
    "Synchronous": {},
    "OneStepOffPolicy": {},
    "FullyAsynchronous": {"max_staleness": 3},
    "MultiExplorerAsynchronous": {"max_staleness": 3},
}


class ExplorerKiller(threading.Thread):
    """Sends SIGKILL to explorers, now this one and now that, at moments that a seed decides."""

    def __init__(self, data: Any, kills: int, seed: int, mean_pause_s: float) -> None:
        super().__init__(daemon=True)
        self.kills = 0
        self._data = data
        self._wanted = kills
        self._draw = random.Random(seed)
        self._mean_pause_s = mean_pause_s
        self._end = threading.Event()

    def run(self) -> None:
        while self.kills < self._wanted and not self._end.wait(self._draw.expovariate(1 / self._mean_pause_s)):
            members = list(self._data._pool._members.values())
            if members:
                os.kill(self._draw.choice(members).process.pid, signal.SIGKILL)
                self.kills += 1

    def close(self) -> None:
        self._end.set()
        self.join(10)


def live(
    strategy: str,
    *,
    epochs: int,
    explorer_kills: int = 0,
    seed: int = 0,
    pause_s: float = 0.7,
    engine: Any = None,
    explorers: int | None = None,
    transport: Any = None,
    **settings: Any,
) -> None:
    """Trains for some epochs, going on where an earlier life was cut off, and prints how it went."""
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    import lightning_rft as rft
    from tests.trainer_and_data import fake_data, quiet_trainer

    class Announce(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            touch("training")

    torch.set_num_threads(1)
    pool = rft.ExplorerPool(
        engine or LightEngine(tokens_per_second=60, mean_tokens=5),
        explorers or (2 if strategy == "MultiExplorerAsynchronous" else 1),
        # the pause before a restart doubles with every death that is remembered
        max_restarts=1000,
        restart_window_s=0.5,
    )
    defaults: dict[str, Any] = {
        "tasks": TASKS,
        "explorers": pool,
        "tasks_per_step": TASKS_PER_STEP,
        "max_new_tokens": 8,
        "sampling": rft.Sampling(seed=0),
        "timeouts": rft.Timeouts(start_s=60.0, progress_s=30.0),
    }
    data = fake_data(**defaults | settings)
    killer = ExplorerKiller(data, explorer_kills, seed, pause_s)
    trainer = quiet_trainer(
        os.getcwd(),
        Announce(),
        getattr(rft, strategy)(transport=transport, **STRATEGIES[strategy]),
        ModelCheckpoint(every_n_train_steps=1, save_last=True, save_top_k=1, monitor=None),
        max_epochs=epochs,
    )
    began = time.monotonic()
    killer.start()
    try:
        trainer.fit(rft.RFTModule(os.environ[MODEL]), data, ckpt_path="last")
    finally:
        killer.close()
    print(json.dumps({"steps": trainer.global_step, "kills": killer.kills, "seconds": time.monotonic() - began}))


def buffer(folder: Path) -> Path:
    """Where such a run keeps its buffer."""
    return folder / "rft" / "buffer.sqlite"


def check_every_task_ended_once(path: Path, epochs: int) -> Counter[State]:
    """Each task of each epoch was trained, or failed, exactly once; returns how many of each."""
    states: Counter[State] = Counter()
    with Ledger.open(path) as ledger:
        for epoch in range(epochs):
            ended = ledger.ended(epoch)
            assert sorted(task for task, _ in ended) == sorted(task.id for task in as_tasks(TASKS)), epoch
            states.update(state for _, state in ended)
        assert len(ledger.trained_tasks()) == epochs * len(TASKS)
    return states
