"""The same as ``test_chaos.py`` with the real engine: fewer kills, since a new one takes seconds to start."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_rft.buffer.ledger import Ledger, State
from tests.killed_runs import STRATEGIES, TASKS, TASKS_PER_STEP, buffer
from tests.processes import MARK, MODEL, alive, until
from tests.test_chaos import CHAOS, check_every_task_ended_once, in_order

pytestmark = [pytest.mark.chaos, pytest.mark.vllm, pytest.mark.timeout(1800)]
pytest.importorskip("vllm")

OFTEN = ("Synchronous", "MultiExplorerAsynchronous")


@pytest.fixture
def life(tmp_path: Path, tiny_model_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts scripts; at the end none of their processes may be left."""
    mark = str(tmp_path)
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = os.environ | {"PYTHONPATH": path, MARK: mark, MODEL: str(tiny_model_path), "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[bytes]] = []

    def start(source: str) -> subprocess.Popen[bytes]:
        (tmp_path / "script.py").write_text(textwrap.dedent(source))
        with open(tmp_path / "stdout", "wb") as out, open(tmp_path / "stderr", "wb") as error:
            command = [sys.executable, "script.py"]
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=error))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(10)
    until(lambda: not alive(mark), f"the end of {alive(mark)}", timeout_s=10)


def script(strategy: str, **arguments: int) -> str:
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


def result(folder: Path, process: subprocess.Popen[bytes]) -> dict[str, float]:
    assert process.wait(timeout=300 + 300 * CHAOS) == 0, (folder / "stderr").read_text()
    found: dict[str, float] = json.loads((folder / "stdout").read_text().splitlines()[-1])
    return found


# The schedule does not know the engine: with vLLM one strategy for each transport is enough, outside of `make chaos`.
@pytest.mark.parametrize(
    "strategy",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.exhaustive) for name in STRATEGIES],
)
def test_explorers_are_killed(strategy: str, life: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path) -> None:
    epochs = 4 + 6 * CHAOS
    found = result(tmp_path, life(script(strategy, epochs=epochs, explorer_kills=CHAOS, seed=CHAOS)))
    assert found["steps"] == epochs * len(TASKS) // TASKS_PER_STEP
    assert found["kills"] == CHAOS
    check_every_task_ended_once(buffer(tmp_path), epochs)


def test_the_trainer_is_killed(life: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path) -> None:
    draw, lives, epochs = random.Random(CHAOS), min(3, CHAOS), 16
    source = script("Synchronous", epochs=epochs)
    for _ in range(lives):
        (tmp_path / "training").unlink(missing_ok=True)
        process = life(source)
        until((tmp_path / "training").exists, "training", timeout_s=120)
        time.sleep(draw.uniform(0.0, 6.0))
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL, (tmp_path / "stderr").read_text()
        until(lambda: not alive(str(tmp_path)), "the end of its processes", timeout_s=10)
    found = result(tmp_path, life(source))
    assert found["steps"] == epochs * len(TASKS) // TASKS_PER_STEP
    with Ledger.open(buffer(tmp_path)) as ledger:
        assert ledger.trained_tasks() == in_order(epochs)
    assert check_every_task_ended_once(buffer(tmp_path), epochs) == Counter({State.TRAINED: epochs * len(TASKS)})
