"""``lightning-rft evaluate RUN``: every checkpoint of a run against held-out tasks, and what is in the way of that."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_rft.cli import main
from lightning_rft.monitor.curves import table
from tests.processes import Script

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*cannot be loaded, and is left out"),
]

STEPS = 3
LIGHT = ["--data.engine", "tests.processes.LightEngine"]


def run_command(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "1")  # so that it is removed again once seed_everything has set it
            del os.environ[name]
        patch.setattr(sys, "argv", ["lightning-rft", *arguments])
        main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path, one_thread: None) -> Path:
    """Folder of a run of a model that learns, validated and saved after every step."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = {
        "model": {
            "model": str(tiny_model_path),
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 8}},
        },
        "data": {
            "tasks": [f"{index} + 1 =" for index in range(6)],
            "val_tasks": {"even": ["2 + 2 =", "4 + 2 ="], "odd": ["1 + 2 =", "3 + 2 =", "5 + 2 ="]},
            "val_samples": 2,
            "reward": "tests.processes.share_of_letters",
            "engine": "TransformersEngine",
            "tasks_per_step": 2,
            "samples_per_task": 4,
            "max_new_tokens": 6,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "callbacks": [
                {"class_path": "Synchronous"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"save_top_k": -1, "every_n_train_steps": 1, "save_last": True},
                },
            ],
            "default_root_dir": str(folder),
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder)}},
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "val_check_interval": 1,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    (folder / "given.yaml").write_text(yaml.safe_dump(config))
    run_command("fit", "--config", str(folder / "given.yaml"))
    return folder / "lightning_logs" / "version_0"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(run: Path, step: int) -> Path:
    (found,) = (run / "checkpoints").glob(f"*step={step}.ckpt")
    return found


def contents(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_every_checkpoint_is_measured_as_it_was_in_training(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = contents(trained)
    run_command("evaluate", str(trained))
    assert before.items() <= contents(trained).items(), "the run is as it was"
    rows = read_csv(trained / "evaluation.csv")
    assert [(row["step"], row["checkpoint"]) for row in rows] == [
        ("0", ""),
        *((str(step), checkpoint(trained, step).name) for step in range(1, STEPS + 1)),
    ]
    folders = dict.fromkeys(name.rpartition("/")[0] for name in rows[0] if "/" in name)
    assert list(folders) == ["val", "val/even", "val/odd"]
    logged = [row for row in read_csv(trained / "metrics.csv") if row["val/reward"]]
    assert len(logged) == STEPS
    for row, then in zip(rows[1:], logged, strict=True):
        for metric in ("val/reward", "val/odd/reward", "val/even/pass_at_2", "val/completion_length"):
            assert float(row[metric]) == pytest.approx(float(then[metric]), rel=1e-5), metric
    assert len({row["val/reward"] for row in rows}) == STEPS + 1, "weights differ, and so do answers"
    said = capfd.readouterr().out
    assert (
        table([{name: float(value) if "/" in name else value for name, value in row.items()} for row in rows]) in said
    )
    assert (trained / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_that_cannot_be_loaded_are_left_out_and_named_at_the_end(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torn = checkpoint(run, 1)
    torn.write_bytes(torn.read_bytes()[:1000])
    foreign = torch.load(checkpoint(run, 2), weights_only=False)
    foreign["state_dict"].popitem()
    torch.save(foreign, checkpoint(run, 2))
    with pytest.raises(SystemExit, match=rf"(?s)could not be loaded:\n{torn.name}: .*step=2.ckpt: .*Missing key"):
        run_command("evaluate", str(run), *LIGHT, "--data.val_samples=3", "--data.val_tasks", "['2 + 2 =', '2 + 4 =']")
    rows = read_csv(run / "evaluation.csv")
    assert [row["step"] for row in rows] == ["0", "3"]
    assert {"val/pass_at_1", "val/pass_at_2", "val/pass_at_3", "val/maj_at_3", "val/avg_at_3"} <= rows[0].keys()
    assert not any("odd" in name for name in rows[0])


def test_a_run_from_python_needs_its_config_named(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").rename(run / "mine.yaml")
    (run / "checkpoints").rename(run / "elsewhere")
    for step in (1, 2):
        file = next((run / "elsewhere").glob(f"*step={step}.ckpt"))
        file.unlink()
    elsewhere = ["--checkpoints", str(run / "elsewhere"), f"--config={run / 'mine.yaml'}"]
    run_command("evaluate", str(run), *elsewhere, *LIGHT)
    assert [row["step"] for row in read_csv(run / "evaluation.csv")] == ["0", "3"]
    assert not (run / "config.yaml").exists()


def test_two_ranks_measure_what_one_does(
    run: Path, tmp_path: Path, start_ranks: Callable[[str], list[Script]], capfd: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 3):
        checkpoint(run, step).unlink()
    (run / "checkpoints" / "last.ckpt").unlink()
    run_command("evaluate", str(run), *LIGHT)
    one = (run / "evaluation.csv").read_text()
    (run / "evaluation.csv").unlink()
    options = ["evaluate", str(run), *LIGHT, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    scripts = start_ranks(f"""
        import sys
        from lightning_rft.cli import main
        sys.argv += {options}
        main()
    """)
    for script in scripts:
        assert script.wait(240) == 0, script.stderr
    assert (run / "evaluation.csv").read_text() == one and len(one.splitlines()) == 3
    assert ["step" in script.stdout for script in scripts] == [True, False]


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda run: shutil.rmtree(run), [], r"run' is no folder: give the folder of a run"),
        (lambda run: shutil.rmtree(run / "rft"), [], r"is no run's folder, since it holds no rft/"),
        (lambda run: (run / "config.yaml").unlink(), [], r"holds no config.yaml, .*: give --config FILE"),
        (lambda run: None, ["--config", "nowhere.yaml"], r"--config nowhere.yaml: there is no such file"),
        (lambda run: (run / "config.yaml").write_text("[1"), [], r"cannot be read as a config"),
        (lambda run: (run / "config.yaml").write_text("a: 1"), [], r"has no model and data"),
        (lambda run: shutil.rmtree(run / "checkpoints"), [], r"/checkpoints' holds no checkpoint: train with a Mod"),
        (lambda run: None, ["--data.nope", "1"], "nope"),
        (lambda run: None, ["--data.val_samples", "0"], "val_samples=0 must be at least 1"),
    ],
)
def test_what_is_missing_is_said(
    run: Path, capfd: pytest.CaptureFixture[str], spoil: Any, options: list[str], message: str
) -> None:
    spoil(run)
    with pytest.raises(SystemExit) as end:
        run_command("evaluate", str(run), *options)
    said = capfd.readouterr().err
    assert end.value.code == 2
    assert re.search(message, said), said
    assert "Traceback" not in said


def test_the_folder_of_all_runs_is_not_one_of_them(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command("evaluate", str(trained.parents[1]))
    assert f"give one that does, such as '{trained}'" in capfd.readouterr().err


def test_no_run_at_all(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_command("evaluate")
    assert end.value.code == 2
    assert "RUN is missing: lightning-rft evaluate RUN" in capfd.readouterr().err
