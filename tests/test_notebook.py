"""Notebooks: the quickstart, cells that are run twice, and kernels that are interrupted."""

from __future__ import annotations

import copy
import csv
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import LIGHT, Kernel, variables
from tests.processes import Script, alive, until

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "notebooks" / "quickstart.ipynb"
QUICK = {"STEPS": 2, "FOLDER": "out"}

Notebook = dict[str, Any]


# The quickstart


def test_the_notebook_is_kept_without_outputs() -> None:
    """So that none can be untrue, and a change of a cell is all that a comparison of versions shows."""
    notebook = json.loads(NOTEBOOK.read_text())
    pytest.importorskip("nbformat").validate(notebook)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code(notebook))
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_every_cell_can_be_run_twice_under_nbconvert(tmp_path: Path, tiny_model_path: Path) -> None:
    pytest.importorskip("nbconvert")
    notebook = json.loads(NOTEBOOK.read_text())
    (parameters,) = [cell for cell in code(notebook) if "parameters" in cell["metadata"].get("tags", ())]
    parameters["source"] = [f"{name} = {value!r}\n" for name, value in given(tiny_model_path).items()]
    twice = [copy.deepcopy(cell) | {"id": f"{cell['id']}-{run}"} for cell in notebook["cells"] for run in (1, 2)]
    (tmp_path / "given.ipynb").write_text(json.dumps(notebook | {"cells": twice}))
    options = ["--to", "notebook", "--execute", "given.ipynb", "--output", "run.ipynb"]
    execute("nbconvert", options, tmp_path, tiny_model_path, startup=LIGHT)
    outputs = results(tmp_path / "run.ipynb")
    assert "lightning_rft: starting 1 explorer (LightEngine)" in text(outputs["fit-1"])
    for run in (1, 2):
        assert text(outputs[f"reward-{run}"]) == "1.0"
        assert [kinds(outputs[f"{name}-{run}"]) for name in ("answers", "plot", "timeline")] == [
            {"text/html", "text/plain"},
            {"image/png", "text/plain"},
            {"image/png", "text/plain"},
        ]
    metrics = (tmp_path / "out" / "version_0" / "metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("rft/reward")
    assert len([line for line in metrics[1:] if line.split(",")[column]]) == 3 * QUICK["STEPS"]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


@pytest.mark.vllm
def test_the_notebook_with_vllm_under_papermill(tmp_path: Path, tiny_model_path: Path) -> None:
    pytest.importorskip("papermill")
    options = [str(NOTEBOOK), "run.ipynb", "--kernel", "python3", "--no-progress-bar"]
    for name, value in given(tiny_model_path).items():
        options += ["-p", name, str(value)]
    execute("papermill", options, tmp_path, tiny_model_path)
    outputs = results(tmp_path / "run.ipynb")
    assert "starting 1 explorer (VLLMEngine)" in text(outputs["fit"])
    assert "image/png" in kinds(outputs["timeline"]) & kinds(outputs["second-fit"])


@pytest.mark.parametrize("engine", ["light", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_the_script(start: Callable[..., Script], tmp_path: Path, engine: str) -> None:
    program = EXAMPLES / "quickstart.py"
    assert len(program.read_text().splitlines()) < 40
    script = start(
        f"""
        import os, runpy
        import lightning_rft
        from tests.processes import MODEL, LightEngine
        if {engine == "light"}:
            lightning_rft.VLLMEngine = lambda **_: LightEngine(mean_tokens=4)
        os.environ |= {{"MODEL": os.environ[MODEL], "STEPS": "2"}}
        runpy.run_path({str(program)!r}, run_name="__main__")
        """,
        vllm=engine == "vllm",
    )
    assert script.wait(280) == 0, script.stderr
    answers = [line for line in script.stdout.splitlines() if line.startswith("What is ")]
    assert [line.split("number. ")[0] for line in answers[:3]] == [line.split("number. ")[0] for line in answers[3:]]
    assert len(answers) == 6
    assert (tmp_path / "runs" / "quickstart" / "model" / "model.safetensors").exists()


def test_the_agent(start: Callable[[str], Script], tmp_path: Path) -> None:
    pytest.importorskip("openai")
    script = start(f"""
        import os, runpy
        import lightning_rft
        from tests.processes import MODEL, LightEngine
        lightning_rft.VLLMEngine = lambda **_: LightEngine(mean_tokens=4)
        os.environ |= {{"MODEL": os.environ[MODEL], "STEPS": "2"}}
        runpy.run_path({str(EXAMPLES / "agent.py")!r}, run_name="__main__")
    """)
    assert script.wait() == 0, script.stderr
    with (tmp_path / "runs" / "agent" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rft/reward"] for row in rows if row["rft/reward"]] == ["0.0", "0.0"]  # the model is random
    assert {row["val/without/reward"] for row in rows if row["val/without/reward"]} == {"0.0"}


# A kernel


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("kernel"), tiny_model_path)
    # imports everything, and takes long where others want the cores
    first = kernel.end(kernel.begin("from tests.processes import fit; fit()"), timeout_s=200)
    assert not first.error, first.text
    yield kernel
    kernel.close()


STARTING = """
import time
from tests.processes import LightEngine, fit, touch
class Engine(LightEngine):
    def start(self, model, *, max_model_len, seed):
        touch("starting")
        time.sleep(60)
fit(engine=Engine())
"""
EXPLORING = """
from tests.processes import LightEngine, fit, touch
class Engine(LightEngine):
    def step(self):
        touch("exploring")
        return super().step()
fit(engine=Engine(tokens_per_second=20, mean_tokens=10_000), max_new_tokens=400)
"""
TRAINING = """
import threading
from lightning_rft import RFTModule
from tests.processes import fit, touch
class Module(RFTModule):
    def training_step(self, batch, batch_idx):
        touch("training")
        threading.Event().wait(60)
fit(Module)
"""
PUSHING = """
import time
from tests.processes import LightEngine, fit, touch
class Engine(LightEngine):
    def load(self, manifest, version):
        if version > 0:
            touch("pushing")
            time.sleep(60)
        super().load(manifest, version)
fit(engine=Engine(), strategy="FullyAsynchronous", tasks=[f"1 + {index} =" for index in range(9)])
"""
REWARDING = """
import time
from tests.processes import fit, touch
def reward(completion, task):
    touch("rewarding")
    time.sleep(60)
fit(reward=reward)
"""


VLLM = """
import lightning_rft as rft
from tests.processes import fit, touch
def reward(completion, task):
    touch("sampled")
    return float(len(completion) % 2)
fit(engine=rft.VLLMEngine(), reward=reward, timeouts=rft.Timeouts(), tasks=["1 + 1 ="] * 10**4)
"""


@pytest.mark.parametrize(
    "cell", [STARTING, EXPLORING, TRAINING, PUSHING, REWARDING, pytest.param(VLLM, marks=pytest.mark.vllm)]
)
def test_an_interrupt_leaves_no_process_and_the_next_cell_trains(kernel: Kernel, cell: str) -> None:
    running = kernel.begin(cell)
    kernel.wait_for(cell.split('touch("')[1].split('"')[0])
    kernel.interrupt()
    assert kernel.end(running).error in ("KeyboardInterrupt", "SystemExit")
    until(lambda: not kernel.others(), f"the end of {kernel.others()}", timeout_s=10)
    after = kernel.run("from tests.processes import fit; print('steps', fit().global_step)")
    assert not after.error and "steps 3" in after.text, after.text
    assert not kernel.others()


def test_the_same_objects_train_after_an_interrupt(kernel: Kernel) -> None:
    """As when the cells with ``fit`` are run again."""
    kernel.run(
        """
        import os
        import lightning_rft as rft
        from tests.processes import MODEL, touch
        from tests.trainer_and_data import fake_data, quiet_trainer
        class Module(rft.RFTModule):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                if self.global_step == 2 and not os.path.exists("second"):
                    touch("second")
                    import threading
                    threading.Event().wait(60)
                return loss
        module, data = Module(os.environ[MODEL]), fake_data(tasks_per_step=1, val_tasks=["2 + 2 ="])
        settings = {"max_epochs": 1, "limit_val_batches": 1.0}
        trainer = quiet_trainer(os.getcwd(), rft.Synchronous(), rft.TimelineCallback(), **settings)
        """
    )
    running = kernel.begin("trainer.fit(module, data)")
    kernel.wait_for("second")
    kernel.interrupt()
    assert kernel.end(running).error
    assert not kernel.others()
    outcome = kernel.run(
        "trainer.fit(module, data); trainer.validate(module, data); print('steps', trainer.global_step)"
    )
    assert not outcome.error, outcome.text
    assert "steps 12" in outcome.text
    assert not kernel.others()


def test_explorers_that_are_held_end_with_the_cell_that_is_interrupted(kernel: Kernel) -> None:
    running = kernel.begin(
        """
        from tests.processes import touch
        import threading
        with fake_data() as data:
            quiet_trainer(os.getcwd(), rft.Synchronous(), max_steps=1).fit(rft.RFTModule(os.environ[MODEL]), data)
            touch("held")
            threading.Event().wait(60)
        """
    )
    kernel.wait_for("held")
    assert kernel.others()
    kernel.interrupt()
    assert kernel.end(running).error == "KeyboardInterrupt"
    assert not kernel.others()


def test_an_error_in_a_cells_reward_shows_its_line(kernel: Kernel) -> None:
    kernel.run("def reward(completion, task):\n    return 1 / 0  # the line that is to blame\n")
    outcome = kernel.run("from tests.processes import fit; fit(reward=reward)")
    assert outcome.error == "ZeroDivisionError"
    assert "line 2, in reward\n    return 1 / 0  # the line that is to blame\n" in outcome.text


def test_a_reward_that_is_edited_counts_from_the_next_fit(kernel: Kernel) -> None:
    outcomes = [
        kernel.run(
            f"from tests.processes import fit\ndef reward(completion, task):\n    return {value}\n"
            "print('reward', float(fit(reward=reward).callback_metrics['rft/reward']))"
        )
        for value in (0.25, 0.75)
    ]
    assert ["reward 0.25" in outcomes[0].text, "reward 0.75" in outcomes[1].text] == [True, True]


# How


def given(model: Path) -> dict[str, Any]:
    return QUICK | {"MODEL": str(model)}


def execute(program: str, options: list[str], folder: Path, model: Path, startup: str = "") -> None:
    """Runs a program that runs a notebook, and sees that all its processes end with it."""
    mark = uuid.uuid4().hex
    done = subprocess.run(
        [sys.executable, "-m", program, *options],
        cwd=folder,
        env=variables(folder, model, mark, startup),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    until(lambda: not alive(mark), f"the end of {alive(mark)}", timeout_s=10)


def code(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def results(path: Path) -> dict[str, list[Any]]:
    """The outputs of every cell, by its id."""
    return {cell["id"]: cell["outputs"] for cell in code(json.loads(path.read_text()))}


def kinds(outputs: list[Any]) -> set[str]:
    return {kind for output in outputs for kind in output.get("data", ())}


def text(outputs: list[Any]) -> str:
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join(line for lines in shown for line in lines)
