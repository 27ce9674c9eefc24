"""The same as ``test_chaos.py`` with the real engine: fewer kills, since a new one takes seconds to start."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_rft.buffer.ledger import Ledger, State
from tests.killed_runs import STRATEGIES, TASKS, TASKS_PER_STEP, buffer
from tests.processes import Script, Zygote, until
from tests.test_chaos import CHAOS, check_every_task_ended_once, in_order

pytestmark = [pytest.mark.chaos, pytest.mark.vllm, pytest.mark.timeout(1800)]

OFTEN = ("Synchronous", "MultiExplorerAsynchronous")


@pytest.fixture
def life(zygote: Zygote, tmp_path: Path, tiny_model_path: Path) -> Iterator[Callable[[str], Script]]:
    """Starts scripts."""
    scripts: list[Script] = []

    def start(source: str) -> Script:
        scripts.append(zygote.start(source, tmp_path, tiny_model_path, vllm=True))
        return scripts[-1]

    yield start
    for script in scripts:
        script.kill()


def source(strategy: str, **arguments: int) -> str:
    return f"""
        import lightning_rft as rft
        from tests.killed_runs import live
        live(
            {strategy!r},
            engine=rft.VLLMEngine(dtype="float32"),
            max_new_tokens=24,
            pause_s=5.0,
            **{arguments},
        )
    """


def result(script: Script) -> dict[str, float]:
    assert script.wait(300 + 300 * CHAOS) == 0, script.stderr
    script.gone()
    found: dict[str, float] = json.loads(script.stdout.splitlines()[-1])
    return found


# The schedule does not know the engine: with vLLM one strategy for each transport is enough, outside of `make chaos`.
@pytest.mark.parametrize(
    "strategy",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.exhaustive) for name in STRATEGIES],
)
def test_explorers_are_killed(strategy: str, life: Callable[[str], Script], tmp_path: Path) -> None:
    epochs = 4 + 6 * CHAOS
    found = result(life(source(strategy, epochs=epochs, explorer_kills=CHAOS, seed=CHAOS)))
    assert found["steps"] == epochs * len(TASKS) // TASKS_PER_STEP
    assert found["kills"] == CHAOS
    check_every_task_ended_once(buffer(tmp_path), epochs)


def test_the_trainer_is_killed(life: Callable[[str], Script], tmp_path: Path) -> None:
    draw, lives, epochs = random.Random(CHAOS), min(3, CHAOS), 16
    one_life = source("Synchronous", epochs=epochs)
    for _ in range(lives):
        (tmp_path / "training").unlink(missing_ok=True)
        script = life(one_life)
        until((tmp_path / "training").exists, "training", timeout_s=120)
        time.sleep(draw.uniform(0.0, 6.0))
        script.signal(signal.SIGKILL)
        assert script.wait(10) == -signal.SIGKILL, script.stderr
        script.gone()
    found = result(life(one_life))
    assert found["steps"] == epochs * len(TASKS) // TASKS_PER_STEP
    with Ledger.open(buffer(tmp_path)) as ledger:
        assert ledger.trained_tasks() == in_order(epochs)
    assert check_every_task_ended_once(buffer(tmp_path), epochs) == Counter({State.TRAINED: epochs * len(TASKS)})
