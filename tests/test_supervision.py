"""Explorers that die or hang, and rewards that do: survived, counted, and in the end reported."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.processes import Script

pytestmark = pytest.mark.chaos

Start = Callable[[str], Script]


# In front of every script: an engine or a reward that misbehaves as long as a file is not there.
PRELUDE = """
        import json, os, pathlib, signal, time
        import lightning_rft as rft
        from tests.processes import LightEngine, fit, touch

        def once(name):
            "True in the first of all processes that asks."
            try:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
            return True

        TASKS = [f"1 + {index} =" for index in range(9)]

        def report(trainer):
            names = ("failed_groups", "failed_samples", "retried_samples", "explorer_restarts")
            counts = {f"rft/{name}": int(trainer.callback_metrics[f"rft/{name}"]) for name in names}
            print(json.dumps(counts | {"steps": trainer.global_step}))
"""


def outcome(script: Script, timeout_s: float = 60.0) -> dict[str, int]:
    assert script.wait(timeout_s) == 0, script.stderr
    found: dict[str, Any] = json.loads(script.stdout.splitlines()[-1])
    return {name.removeprefix("rft/"): value for name, value in found.items()}


STRATEGIES = [
    (strategy, explorers)
    for strategy in ("Synchronous", "OneStepOffPolicy", "FullyAsynchronous", "MultiExplorerAsynchronous")
    for explorers in (1, 2)
    if (strategy, explorers) != ("MultiExplorerAsynchronous", 1)
]


@pytest.mark.parametrize(("strategy", "explorers"), STRATEGIES)
def test_an_explorer_that_dies_in_mid_rollout(start: Start, strategy: str, explorers: int) -> None:
    script = start(f"""{PRELUDE}
        class Engine(LightEngine):
            def step(self):
                if self.version >= 1 and once("killed"):
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().step()
        report(fit(engine=Engine(), strategy={strategy!r}, explorer_count={explorers}, max_restarts=1, tasks=TASKS))
    """)
    found = outcome(script)
    assert (found["steps"], found["explorer_restarts"], found["failed_groups"]) == (9, 1, 0)


@pytest.mark.parametrize(("strategy", "explorers"), STRATEGIES)
def test_an_explorer_that_dies_in_mid_load(start: Start, strategy: str, explorers: int) -> None:
    script = start(f"""{PRELUDE}
        class Engine(LightEngine):
            def load(self, manifest, version):
                if version >= 1 and once("killed"):
                    os.kill(os.getpid(), signal.SIGKILL)
                super().load(manifest, version)
        report(fit(engine=Engine(), strategy={strategy!r}, explorer_count={explorers}, max_restarts=1, tasks=TASKS))
    """)
    found = outcome(script)
    assert (found["steps"], found["explorer_restarts"], found["failed_groups"]) == (9, 1, 0)


@pytest.mark.parametrize("strategy", ["FullyAsynchronous", "MultiExplorerAsynchronous"])
def test_one_that_dies_in_mid_load_while_training_waits_for_it(start: Start, strategy: str) -> None:
    script = start(f"""{PRELUDE}
        class Engine(LightEngine):
            def load(self, manifest, version):
                if version >= 1 and once("killed"):
                    os.kill(os.getpid(), signal.SIGKILL)
                super().load(manifest, version)
        transport = rft.CollectiveTransport(background="blocking")
        report(fit(engine=Engine(), strategy={strategy!r}, explorer_count=2, max_restarts=1, tasks=TASKS,
                   transport=transport))
    """)
    found = outcome(script)
    assert (found["steps"], found["explorer_restarts"], found["failed_groups"]) == (9, 1, 0)


def test_an_explorer_that_is_stopped_is_ended(start: Start) -> None:
    script = start(f"""{PRELUDE}
        class Engine(LightEngine):
            def step(self):
                if self.version == 1 and once("stopped"):
                    os.kill(os.getpid(), signal.SIGSTOP)
                return super().step()
        report(fit(engine=Engine(), max_restarts=1, timeouts=rft.Timeouts(progress_s=3)))
    """)
    found = outcome(script)
    assert (found["steps"], found["explorer_restarts"], found["failed_groups"]) == (3, 1, 0)
    assert "had work but made no progress for Timeouts(progress_s=3)" in script.stderr


def test_an_engine_that_hangs_while_its_process_lives(start: Start) -> None:
    script = start(f"""{PRELUDE}
        class Engine(LightEngine):
            def step(self):
                if self.version == 1 and once("hanging"):
                    time.sleep(3600)
                return super().step()
        report(fit(engine=Engine(), max_restarts=1, timeouts=rft.Timeouts(progress_s=3)))
    """)
    assert outcome(script)["explorer_restarts"] == 1


def test_one_that_is_stopped_in_mid_push_of_two(start: Start) -> None:
    script = start(f"""{PRELUDE}
        class Engine(LightEngine):
            def load(self, manifest, version):
                if version == 1 and once("stopped"):
                    os.kill(os.getpid(), signal.SIGSTOP)
                super().load(manifest, version)
        report(fit(engine=Engine(), explorer_count=2, max_restarts=2, transport=rft.CollectiveTransport(timeout_s=8)))
    """)
    found = outcome(script)
    assert found["steps"] == 3
    assert found["explorer_restarts"] == 1


def test_a_task_that_kills_explorers_fails_and_is_replaced(start: Start) -> None:
    script = start(f"""{PRELUDE}
        async def workflow(task, policy):
            if "2 =" in task.prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            return await policy(task.prompt)
        report(fit(workflow=workflow, max_restarts=4, buffer="buffer.sqlite"))
        from lightning_rft.buffer.ledger import Ledger
        with Ledger.open("buffer.sqlite") as ledger:
            print(json.dumps([(task, state.value) for task, state in ledger.ended(0)]))
    """)
    assert script.wait() == 0, script.stderr
    report, ended = map(json.loads, script.stdout.splitlines()[-2:])
    assert (report["steps"], report["rft/failed_groups"]) == (3, 1)
    assert sorted(ended) == [["0", "trained"], ["1", "failed"], ["2", "trained"]]
    assert "2 explorers died with it" in script.stderr


@pytest.mark.parametrize("retries", [0, 5])
def test_rewards_that_fail_now_and_then(start: Start, retries: int) -> None:
    script = start(f"""{PRELUDE}
        import random
        draw = random.Random(0)
        def reward(completion, task):
            if draw.random() < 0.1:
                raise LookupError("now and then")
            return float(len(completion) % 3)
        tasks = [f"1 + {{index}} =" for index in range(20)]
        tolerance = rft.Tolerance({retries})
        report(fit(reward=reward, tasks=tasks, tasks_per_step=2, samples_per_task=4, tolerance=tolerance))
    """)
    found = outcome(script)
    assert found["steps"] == 10
    if retries:
        assert found["failed_samples"] == 0
        assert found["retried_samples"] >= 1
    else:
        assert 1 <= found["failed_samples"] <= 30
        assert found["retried_samples"] == 0
        assert "LookupError: now and then" in script.stderr
        assert script.stderr.count("failed after every retry") == 1  # the first of them alone


@pytest.mark.parametrize("hang", ["time.sleep(3600)", "sum(range(10**12))"])
def test_a_reward_that_hangs_now_and_then(start: Start, hang: str) -> None:
    script = start(f"""{PRELUDE}
        def reward(completion, task):
            if once("hung"):
                {hang}
            return float(len(completion) % 3)
        report(fit(reward=reward, timeouts=rft.Timeouts(reward_s=1), tolerance=rft.Tolerance(1)))
    """)
    found = outcome(script)
    assert (found["steps"], found["retried_samples"], found["explorer_restarts"]) == (3, 1, 0)


def test_an_async_reward_that_holds_up_its_explorer(start: Start) -> None:
    script = start(f"""{PRELUDE}
        async def reward(completion, task):
            if once("hung"):
                time.sleep(3600)  # not asyncio.sleep: nothing else in this process runs on
            return float(len(completion) % 3)
        report(fit(reward=reward, max_restarts=1, timeouts=rft.Timeouts(progress_s=3)))
    """)
    found = outcome(script)
    assert (found["steps"], found["explorer_restarts"]) == (3, 1)


def test_a_workflow_that_waits_for_ever(start: Start) -> None:
    script = start(f"""{PRELUDE}
        import asyncio
        async def workflow(task, policy):
            if once("hung"):
                await asyncio.sleep(3600)
            return await policy(task.prompt)
        report(fit(workflow=workflow, timeouts=rft.Timeouts(workflow_s=1), tolerance=rft.Tolerance(1)))
    """)
    found = outcome(script)
    assert (found["steps"], found["retried_samples"]) == (3, 1)


def test_explorers_that_die_again_and_again_end_the_run(start: Start) -> None:
    script = start(f"""{PRELUDE}
        class Engine(LightEngine):
            def step(self):
                if self.version == 1:
                    print("last words", flush=True)
                    os._exit(9)
                return super().step()
        fit(engine=Engine(), max_restarts=2)
    """)
    assert script.wait() == 1
    last = script.stderr.splitlines()
    assert any("ExplorerError: explorer 2 ended with status 9 (max_restarts=2 within" in line for line in last)
    assert last[-1] == "last words"


def test_validation_survives_the_death_of_its_explorer(start: Start) -> None:
    script = start(f"""{PRELUDE}
        class Engine(LightEngine):
            def add(self, request):
                if request.sampling.temperature == 0 and once("killed"):
                    os.kill(os.getpid(), signal.SIGKILL)
                super().add(request)
        report(fit(engine=Engine(), max_restarts=1, val_tasks=["2 + 2 =", "2 + 3 ="]))
    """)
    found = outcome(script)
    assert (found["steps"], found["explorer_restarts"]) == (3, 1)


def test_a_killed_explorers_processes_end_with_it(start: Start) -> None:
    script = start(f"""{PRELUDE}
        def reward(completion, task):
            touch("rewarding")
            if once("hung"):
                time.sleep(3600)
            return 1.0
        report(fit(reward=reward, max_restarts=1))
    """)
    script.wait_for("rewarding")
    (explorer,) = script.children("lightning_rft.explorer.worker.main")
    scorers = script.children("lightning_rft.explorer.worker.scorer")
    assert scorers
    os.kill(explorer, signal.SIGKILL)
    assert outcome(script)["explorer_restarts"] == 1
    for scorer in scorers:
        with pytest.raises(ProcessLookupError):
            os.kill(scorer, 0)
