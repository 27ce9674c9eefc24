"""Explorers on another machine: runs in all modes while the line is cut, and explorers and whole machines are lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_rft.buffer.ledger import State
from lightning_rft.explorer.secret import VARIABLE
from tests.killed_runs import STRATEGIES, TASKS, check_every_task_ended_once
from tests.machines import Machine, Machines
from tests.processes import HERE, MARK, Script, Zygote, until

pytestmark = pytest.mark.chaos

PORT = 29600
SECRET = {VARIABLE: "of-this-test-alone"}
SILENCE_S = 3

# The trainer's machine. At the third batch of each run it waits for what the test does to the explorers.
TRAINER = """
import json, os
import torch
from lightning.pytorch.callbacks import Callback
import lightning_rft as rft
from tests.killed_runs import STRATEGIES, TASKS, TASKS_PER_STEP
from tests.machines import enter
from tests.processes import MODEL, LightEngine, touch, until
from tests.trainer_and_data import fake_data, quiet_trainer

enter({machine!r})
torch.set_num_threads(1)

class Meet(Callback):
    def __init__(self, name):
        self.name = name

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            touch(self.name + ".reached")
            until(lambda: os.path.exists(self.name + ".done"), "what the test does")

pool = rft.ExplorerPool(
    LightEngine(tokens_per_second=200, mean_tokens=5), {count},
    max_restarts={restarts}, launcher=rft.DialIn(bind="10.77.0.1:{port}", silence_s={silence}),
)
data = fake_data(
    tasks=TASKS, explorers=pool, tasks_per_step=TASKS_PER_STEP, sampling=rft.Sampling(seed=0), max_new_tokens=8,
    timeouts=rft.Timeouts(start_s=60, progress_s=60),
)
result = {{}}
with data:
    for name in {strategies!r}:
        data.buffer = rft.Buffer(name + ".sqlite")
        strategy = getattr(rft, name)(transport=rft.CheckpointTransport(), **STRATEGIES[name])
        trainer = quiet_trainer(".", strategy, Meet(name), max_epochs={epochs})
        trainer.fit(rft.RFTModule(os.environ[MODEL]), data)
        result[name] = trainer.global_step
        result["restarts"] = pool.restarts
print(json.dumps(result))
"""

Start = Callable[..., Script]


@pytest.fixture
def start(zygote: Zygote, tmp_path: Path, tiny_model_path: Path, machines: Machines) -> Iterator[Start]:
    scripts: list[Script] = []

    def start(**settings: object) -> Script:
        source = TRAINER.format(machine=machines.one.name, port=PORT, silence=SILENCE_S, **settings)
        scripts.append(zygote.start(source, tmp_path, tiny_model_path, variables=SECRET))
        return scripts[-1]

    yield start
    for script in scripts:
        script.kill()


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Callable[[Machine, Script], subprocess.Popen[bytes]]]:
    """Starts ``lightning-rft join`` on a machine."""
    joiners: list[subprocess.Popen[bytes]] = []

    def join(machine: Machine, script: Script) -> subprocess.Popen[bytes]:
        command = machine.command(sys.executable, "-m", "lightning_rft", "join", f"10.77.0.1:{PORT}", "--again", "4")
        with open(tmp_path / f"joiner-{len(joiners)}", "wb") as output:
            joiners.append(
                subprocess.Popen(
                    command, env=os.environ | SECRET | {MARK: script._mark}, cwd=HERE.parent,
                    stdout=output, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        return joiners[-1]

    yield join
    for joiner in joiners:
        joiner.kill()
        joiner.wait()


def test_runs_outlive_what_befalls_their_explorers(
    start: Start, join: Callable[[Machine, Script], subprocess.Popen[bytes]], machines: Machines, tmp_path: Path
) -> None:
    epochs = 2
    script = start(strategies=list(STRATEGIES), count=2, restarts=9, epochs=epochs)
    first, second = (join(machines.two, script) for _ in range(2))

    def reached(name: str) -> None:
        script.wait_for(f"{name}.reached")

    def done(name: str) -> None:
        (tmp_path / f"{name}.done").touch()

    reached("Synchronous")
    machines.cut()
    done("Synchronous")
    time.sleep(0.7)  # a short cut
    machines.mend()

    reached("OneStepOffPolicy")
    os.kill(script.children("worker.main")[0], signal.SIGKILL)  # its joiner comes again
    done("OneStepOffPolicy")

    reached("FullyAsynchronous")
    until(lambda: len(script.children("worker.main")) == 2, "its return")
    first.kill()  # for good, and its explorer with it
    done("FullyAsynchronous")

    reached("MultiExplorerAsynchronous")
    third = join(machines.one, script)
    until(lambda: "place" in (tmp_path / "joiner-2").read_text(), "a third that takes the vacant place")
    machines.cut()  # for good: the second is lost
    done("MultiExplorerAsynchronous")

    assert script.wait() == 0, script.stderr
    result = json.loads(script.stdout.splitlines()[-1])
    assert result == {**dict.fromkeys(STRATEGIES, epochs * 4), "restarts": 3}
    for strategy in STRATEGIES:
        states = check_every_task_ended_once(tmp_path / f"{strategy}.sqlite", epochs)
        assert states == {State.TRAINED: epochs * len(TASKS)}
    assert third.wait(20) == second.wait(20) == 0  # they have come again in vain
    script.gone()


def test_a_line_that_is_cut_for_good_ends_a_run_that_has_no_other(
    start: Start, join: Callable[[Machine, Script], subprocess.Popen[bytes]], machines: Machines, tmp_path: Path
) -> None:
    script = start(strategies=["Synchronous"], count=1, restarts=0, epochs=5)
    joiner = join(machines.two, script)
    script.wait_for("Synchronous.reached")
    machines.cut()
    (tmp_path / "Synchronous.done").touch()
    began = time.monotonic()
    assert script.wait() == 1
    assert SILENCE_S - 1 < time.monotonic() - began < SILENCE_S + 15  # the end of an interpreter takes a while, too
    assert "ExplorerError: explorer 0 is gone: its connection has ended (max_restarts=0 within" in script.stderr
    assert joiner.wait(30) == 0
    script.gone()  # on both machines
