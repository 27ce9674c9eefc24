"""However a run ends: the right exit status, the error the user needs to see, and no process left behind."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import Script

Start = Callable[[str], Script]


def test_normal_end(start: Start) -> None:
    script = start("""
        from tests.processes import fit
        trainer = fit(val_tasks=["2 + 2 ="])
        print("steps", trainer.global_step)
    """)
    assert script.wait() == 0, script.stderr
    script.gone()
    assert script.stdout.splitlines()[-1] == "steps 3"
    assert "Traceback" not in script.stderr


# Errors


def test_exception_in_training(start: Start) -> None:
    script = start("""
        from lightning_rft import RFTModule
        from tests.processes import fit
        class Module(RFTModule):
            def training_step(self, batch, batch_idx):
                if batch_idx == 1:
                    raise ZeroDivisionError("in the second step")
                return super().training_step(batch, batch_idx)
        fit(Module)
    """)
    assert script.wait() == 1
    assert script.stderr.endswith("ZeroDivisionError: in the second step\n")


def test_exception_in_the_reward(start: Start, tmp_path: Path) -> None:
    script = start("""
        import lightning_rft as rft
        from tests.processes import fit
        class Unhappy(Exception):
            pass
        def reward(completion, task):
            with open("calls", "a") as calls:
                print(repr(completion), file=calls)
            raise Unhappy("no", task.prompt)  # the line that is to blame
        try:
            fit(reward=reward, tolerance=rft.Tolerance(retries=2))
        except Unhappy as error:
            print(error.args)
            raise
    """)
    assert script.wait() == 1
    assert script.stdout.startswith("('no', '1 + ")  # its own class, so that `except` finds it
    assert f'  File "{tmp_path}/script.py", line 9, in reward\n    raise Unhappy("no", task.prompt)' in script.stderr
    assert script.stderr.splitlines()[-1].startswith("Unhappy: ('no', '1 + ")
    # a retried sample has the same seed, so it gives the same completion
    calls = Counter((tmp_path / "calls").read_text().splitlines())
    assert max(calls.values()) == 3


def test_exception_in_the_reward_of_a_notebook(start: Start) -> None:
    script = start("""
        import linecache
        from tests.processes import fit
        cell = "def reward(completion, task):\\n    return 1 / 0  # the line that is to blame\\n"
        name = "<ipython-input-3-0123456789ab>"
        linecache.cache[name] = len(cell), None, cell.splitlines(True), name  # as IPython does
        exec(compile(cell, name, "exec"))
        fit(reward=reward)
    """)
    assert script.wait() == 1
    shown = 'File "<ipython-input-3-0123456789ab>", line 2, in reward\n    return 1 / 0  # the line that is to blame\n'
    assert shown in script.stderr


def test_exception_in_a_workflow_whose_file_is_edited_meanwhile(start: Start, tmp_path: Path) -> None:
    script = start("""
        from pathlib import Path
        from tests.processes import fit
        async def workflow(task, policy):
            Path("script.py").write_text("# begun anew\\n" * 20)
            return 1 / 0  # the line that is to blame
        fit(workflow=workflow)
    """)
    assert script.wait() == 1
    shown = f'File "{tmp_path}/script.py", line 6, in workflow\n    return 1 / 0  # the line that is to blame\n'
    assert shown in script.stderr


def test_reward_that_ends_its_process(start: Start) -> None:
    script = start("""
        import os
        import lightning_rft as rft
        from tests.processes import fit
        fit(reward=lambda completion, task: os._exit(7), tolerance=rft.Tolerance(retries=1))
    """)
    assert script.wait() == 1
    assert "RuntimeError: the reward function ended its process at task" in script.stderr.splitlines()[-1]


def test_reward_that_hangs(start: Start) -> None:
    script = start("""
        import time
        import lightning_rft as rft
        from tests.processes import fit
        settings = {"tolerance": rft.Tolerance(retries=0), "timeouts": rft.Timeouts(reward_s=1)}
        fit(reward=lambda completion, task: time.sleep(3600), **settings)
    """)
    assert script.wait() == 1
    assert "DeadlineError: the reward of task" in script.stderr.splitlines()[-1]
    assert "Timeouts(reward_s=1):" in script.stderr.splitlines()[-1]


def test_exception_in_the_workflow(start: Start) -> None:
    script = start("""
        from tests.processes import fit
        async def workflow(task, policy):
            await policy(task.prompt)
            raise LookupError("no such tool")  # the line that is to blame
        fit(workflow=workflow)
    """)
    assert script.wait() == 1
    assert script.stderr.endswith("LookupError: no such tool\n")
    assert "the line that is to blame" in script.stderr


def test_workflow_that_exits(start: Start) -> None:
    script = start("""
        import sys
        from tests.processes import fit
        async def workflow(task, policy):
            sys.exit("enough")  # the line that is to blame
        fit(workflow=workflow)
    """)
    assert script.wait() == 1
    assert "ExplorerError" in script.stderr
    assert "the line that is to blame" in script.stderr


def engine(method: str, body: str) -> str:
    return f"""
        from tests.processes import LightEngine, fit
        class Engine(LightEngine):
            def {method}:
                {body}
        fit(engine=Engine(), val_tasks=["2 + 2 ="])
    """


@pytest.mark.parametrize("method", ["start(self, model, *, max_model_len, seed)", "load(self, manifest, version)"])
def test_error_of_the_engine(start: Start, method: str, tmp_path: Path) -> None:
    script = start(engine(method, 'raise OverflowError("too many")  # the line that is to blame'))
    assert script.wait() == 1
    assert script.stderr.endswith("\nOverflowError: too many\n")
    assert "ended with status" not in script.stderr  # itself, not the end of a log that tells of it
    assert "the line that is to blame" in script.stderr
    assert "the line that is to blame" in (tmp_path / "rft" / "explorer-0.log").read_text()


def test_explorer_that_dies_in_a_push(start: Start) -> None:
    script = start(
        engine("load(self, manifest, version)", 'print("last words", flush=True); __import__("os")._exit(9)')
    )
    assert script.wait() == 1
    assert "lightning_rft.errors.ExplorerError: explorer 0 ended with status 9" in script.stderr
    assert script.stderr.endswith("\nlast words\n")


def test_error_of_the_engine_in_validation(start: Start) -> None:
    script = start("""
        from tests.processes import LightEngine, fit
        class Engine(LightEngine):
            greedy = False
            def add(self, request):
                self.greedy |= request.sampling.temperature == 0
                super().add(request)
            def step(self):
                assert not self.greedy, "greedy"
                return super().step()
        fit(engine=Engine(), val_tasks=["2 + 2 ="])
    """)
    assert script.wait() == 1
    assert script.stderr.endswith("AssertionError: greedy\n")


def test_reward_that_explorers_cannot_load(start: Start) -> None:
    script = start("""
        from tests.processes import fit
        class Reward:
            def __call__(self, completion, task):
                return 1.0
            def __reduce__(self):
                return divmod, (1, 0)
        fit(reward=Reward())
    """)
    assert script.wait() == 1
    assert "reward or workflow cannot be rebuilt in another process (ZeroDivision" in script.stderr.splitlines()[-1]


# Signals


def exploring(start: Start) -> Script:
    """A run whose trainer waits for experience that would take twenty seconds."""
    script = start("""
        from tests.processes import LightEngine, fit, touch
        class Engine(LightEngine):
            def step(self):
                print("the engine steps", flush=True)
                touch("exploring")
                return super().step()
        fit(engine=Engine(tokens_per_second=20, mean_tokens=10_000), max_new_tokens=400)
    """)
    script.wait_for("exploring")
    return script


def starting(start: Start) -> Script:
    """A run whose trainer waits for an engine that would take a minute."""
    script = start("""
        import time
        from lightning.pytorch.callbacks import Callback
        from tests.processes import LightEngine, fit, touch
        class Engine(LightEngine):
            def start(self, model, *, max_model_len, seed):
                touch("starting")
                time.sleep(60)
        class Waits(Callback):
            def on_sanity_check_start(self, trainer, pl_module):
                touch("waiting")
        fit(engine=Engine(), callbacks=(Waits(),), val_tasks=["2 + 2 ="])
    """)
    script.wait_for("starting")
    script.wait_for("waiting")
    return script


def training(start: Start) -> Script:
    """A run in the middle of its second step, which ends when the signal was noticed."""
    script = start("""
        from lightning_rft import RFTModule
        from tests.processes import fit, touch, until
        class Module(RFTModule):
            def training_step(self, batch, batch_idx):
                if batch_idx == 1:
                    touch("training")
                    until(lambda: self.trainer.received_sigterm, "a signal")
                return super().training_step(batch, batch_idx)
        fit(Module)
    """)
    script.wait_for("training")
    return script


def pushing(start: Start) -> Script:
    """An asynchronous run in whose background an explorer loads, for a minute, while the trainer waits."""
    script = start("""
        import time
        from tests.processes import LightEngine, fit, touch
        class Engine(LightEngine):
            def load(self, manifest, version):
                if version > 0:
                    touch("pushing")
                    time.sleep(60)
                super().load(manifest, version)
        tasks = [f"1 + {index} =" for index in range(9)]
        fit(engine=Engine(), strategy="FullyAsynchronous", tasks=tasks)
    """)
    script.wait_for("pushing")
    return script


def test_explorer_that_dies_in_a_push_in_the_background(start: Start) -> None:
    script = pushing(start)
    (explorer,) = script.children("lightning_rft.explorer.worker.main")
    os.kill(explorer, signal.SIGKILL)
    assert script.wait() == 1
    assert "ExplorerError: explorer 0 ended with status -9" in script.stderr


def test_exception_in_training_while_a_push_is_in_the_background(start: Start) -> None:
    script = start("""
        from lightning_rft import RFTModule
        from tests.processes import LightEngine, fit, touch, until
        class Engine(LightEngine):
            def load(self, manifest, version):
                if version > 0:
                    touch("pushing")
                    until(lambda: False, "the end")
                super().load(manifest, version)
        class Module(RFTModule):
            def training_step(self, batch, batch_idx):
                if batch_idx == 1:
                    import pathlib
                    until(lambda: pathlib.Path("pushing").exists(), "a push")
                    raise ZeroDivisionError("in the second step")
                return super().training_step(batch, batch_idx)
        fit(Module, engine=Engine(), strategy="FullyAsynchronous")
    """)
    assert script.wait(timeout_s=30) == 1
    assert script.stderr.endswith("ZeroDivisionError: in the second step\n")


@pytest.mark.parametrize("when", [starting, exploring, training, pushing])
def test_ctrl_c(start: Start, when: Callable[[Start], Script]) -> None:
    script = when(start)
    script.signal(signal.SIGINT, group=True)
    assert script.wait(timeout_s=30) == 1


@pytest.mark.parametrize("when", [starting, exploring, training, pushing])
def test_sigterm(start: Start, when: Callable[[Start], Script]) -> None:
    script = when(start)
    script.signal(signal.SIGTERM)
    assert script.wait(timeout_s=30) == 143


def holding_the_lock(start: Start) -> Script:
    script = start("""
        import re
        from tests.processes import fit, touch
        async def workflow(task, policy):
            touch("holding")
            re.match("(a+)+$", "a" * 60 + "b")  # no other thread runs for years
        fit(workflow=workflow)
    """)
    script.wait_for("holding")
    return script


@pytest.mark.parametrize("when", [starting, exploring, pushing, holding_the_lock])
def test_sigkill(start: Start, when: Callable[[Start], Script]) -> None:
    script = when(start)
    script.signal(signal.SIGKILL)
    assert script.wait(timeout_s=30) == -signal.SIGKILL


def test_explorer_killed(start: Start) -> None:
    script = exploring(start)
    (explorer,) = script.children("lightning_rft.explorer.worker.main")
    os.kill(explorer, signal.SIGKILL)
    assert script.wait() == 1
    assert "ExplorerError: explorer 0 ended with status -9" in script.stderr
    assert script.stderr.splitlines()[-1] == "the engine steps"
