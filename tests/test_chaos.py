"""Nothing lost and nothing doubled, whoever is killed, and whenever.

``make chaos`` does the same with many more kills (``CHAOS=10``, say).
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.experience import GroupKey
from lightning_rft.tasks.plan import TaskCursor, TaskPlan
from lightning_rft.tasks.sources import as_tasks
from tests.killed_runs import STRATEGIES, TASKS, TASKS_PER_STEP, buffer, check_every_task_ended_once
from tests.processes import Script, Zygote

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

CHAOS = int(os.environ.get("CHAOS", "1"))


@pytest.fixture
def scripts() -> Iterator[list[Script]]:
    scripts: list[Script] = []
    yield scripts
    for script in scripts:
        script.kill()


def in_order(epochs: int) -> list[str]:
    """Ids of the tasks as an undisturbed synchronous run trains them."""
    batches = -(-len(TASKS) // TASKS_PER_STEP)
    cursor = TaskCursor(TaskPlan(as_tasks(TASKS), TASKS_PER_STEP, batches, shuffle=True, seed=0))
    return [
        cursor.task(GroupKey(batch, slot)).id for batch in range(epochs * batches) for slot in range(TASKS_PER_STEP)
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_explorers_are_killed(
    strategy: str, zygote: Zygote, tmp_path: Path, tiny_model_path: Path, scripts: list[Script]
) -> None:
    kills, epochs = 4 * CHAOS, 5 * CHAOS
    source = f"""
        from tests.killed_runs import live
        live({strategy!r}, epochs={epochs}, explorer_kills={kills}, seed={CHAOS})
    """
    scripts.append(script := zygote.start(source, tmp_path, tiny_model_path))
    assert script.wait(timeout_s=120 * CHAOS) == 0, script.stderr
    result = json.loads(script.stdout.splitlines()[-1])
    assert result["steps"] == epochs * len(TASKS) // TASKS_PER_STEP
    assert result["kills"] == kills
    states = check_every_task_ended_once(buffer(tmp_path), epochs)
    assert states[State.TRAINED] >= epochs * len(TASKS) - 2 * kills  # only what two explorers died with fails
    script.gone()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_trainer_is_killed(
    strategy: str, zygote: Zygote, tmp_path: Path, tiny_model_path: Path, scripts: list[Script]
) -> None:
    draw, lives, epochs = random.Random(CHAOS), 4 * CHAOS, 3 + 6 * CHAOS
    source = f"""
        from tests.killed_runs import live
        live({strategy!r}, epochs={epochs})
    """
    for _ in range(lives):
        (tmp_path / "training").unlink(missing_ok=True)
        scripts.append(script := zygote.start(source, tmp_path, tiny_model_path))
        if draw.random() < 0.8:  # else perhaps while it starts
            script.wait_for("training")
            time.sleep(draw.uniform(0.0, 1.5))
        else:
            time.sleep(draw.uniform(0.0, 3.0))
        script.signal(signal.SIGKILL)
        assert script.wait() == -signal.SIGKILL, script.stderr  # it had not ended before
        script.gone()
    scripts.append(script := zygote.start(source, tmp_path, tiny_model_path))
    assert script.wait(timeout_s=120 * CHAOS) == 0, script.stderr
    assert json.loads(script.stdout.splitlines()[-1])["steps"] == epochs * len(TASKS) // TASKS_PER_STEP
    with Ledger.open(buffer(tmp_path)) as ledger:
        trained = ledger.trained_tasks()
    if strategy in ("Synchronous", "OneStepOffPolicy"):
        assert trained == in_order(epochs)
    assert Counter(trained) == Counter(in_order(epochs))
    assert check_every_task_ended_once(buffer(tmp_path), epochs)[State.FAILED] == 0
