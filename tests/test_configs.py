"""The configs in examples/: what they say, that they train, and that a printed one is the same run."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_rft as rft
from lightning_rft.cli import RFTCLI, main
from lightning_rft.tasks.sources import read_jsonl

EXAMPLES = Path(__file__).parents[1] / "examples"
STRATEGIES = {
    "synchronous": "Synchronous",
    "one_step_off_policy": "OneStepOffPolicy",
    "fully_asynchronous": "FullyAsynchronous",
    "multi_explorer": "MultiExplorerAsynchronous",
}
CONFIGS = [*STRATEGIES, "gpu"]

Printed = Callable[..., str]

pytestmark = pytest.mark.usefixtures("one_thread", "no_seed_left_behind", "in_the_root")


@pytest.fixture
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Printed:
    """What ``fit --config NAME ... --print_config`` prints, given ``stdin``."""

    def printed(name: str, *options: str, stdin: str = "") -> str:
        config = name if name == "-" else str(EXAMPLES / f"{name}.yaml")
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(sys, "argv", ["lightning-rft", "fit", "--config", config, *options, "--print_config"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        return capsys.readouterr().out

    return printed


def in_miniature(folder: Path, model: Path) -> list[str]:
    """Options that have any of the configs train a tiny model for two steps, with explorers that compute nothing."""
    return [
        f"--model.model={model}",
        "--data.engine=tests.processes.LightEngine",
        "--data.reward=tests.processes.share_of_letters",
        "--data.val_tasks=null",
        "--data.tasks_per_step=2",
        "--data.samples_per_task=2",
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_model_summary=false",  # Lightning warns that it knows no bf16-mixed
        f"--trainer.logger.save_dir={folder}",
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_printed_config_on_standard_input_prints_itself(name: str, printed: Printed) -> None:
    first = printed(name)
    assert first.count("class_path") > 2
    assert printed("-", stdin=first) == first


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_printed_config_trains_on_any_hardware(
    name: str,
    precision: str,
    printed: Printed,
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = printed(name, *in_miniature(tmp_path, tiny_model_path), f"--trainer.precision={precision}")
    monkeypatch.setattr(sys, "stdin", io.StringIO(config))
    monkeypatch.setattr(sys, "argv", ["lightning-rft", "fit", "--config", "-"])
    cli = RFTCLI()
    assert (cli.trainer.global_step, cli.trainer.precision) == (2, precision)
    assert cli.trainer.gradient_clip_val == 1.0 and cli.trainer.optimizers[0].defaults["fused"]
    assert cli.trainer.callback_metrics["rft/grad_norm"] > 0


def test_a_config_travels_through_a_pipe(tiny_model_path: Path, tmp_path: Path) -> None:
    program = f"{sys.executable} -m lightning_rft fit"
    options = " ".join(in_miniature(tmp_path, tiny_model_path))
    line = f"{program} --config examples/synchronous.yaml {options} --print_config | {program} --config -"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    saved = yaml.safe_load((tmp_path / "synchronous" / "version_0" / "config.yaml").read_text())
    assert (saved["trainer"]["max_steps"], saved["model"]["model"]) == (2, str(tiny_model_path))


@pytest.mark.parametrize("name", STRATEGIES)
def test_examples_differ_in_the_strategy_alone(name: str, printed: Printed) -> None:
    found, other = yaml.safe_load(printed(name)), yaml.safe_load(printed("synchronous"))
    (callback,) = found["trainer"].pop("callbacks")
    assert callback["class_path"] == f"lightning_rft.{STRATEGIES[name]}"
    other["trainer"].pop("callbacks")
    assert found["trainer"]["logger"]["init_args"].pop("name") == name
    other["trainer"]["logger"]["init_args"].pop("name")
    assert found["data"].pop("explorers") == (2 if name == "multi_explorer" else 1)
    other["data"].pop("explorers")
    assert found == other


def test_an_option_changes_the_strategy(printed: Printed) -> None:
    config = yaml.safe_load(printed("synchronous", "--trainer.callbacks=FullyAsynchronous"))
    assert config["trainer"]["callbacks"]["class_path"] == "lightning_rft.FullyAsynchronous"


def test_the_config_for_gpus(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = yaml.safe_load(printed("gpu", "--trainer.accelerator=cpu", "--trainer.logger=false"))
    args = {block: config[block] for block in ("model", "data", "trainer")}
    monkeypatch.setattr(sys, "argv", ["notebook"])
    cli = RFTCLI(args=args, run=False, seed_everything_default=False)
    engine = cli.datamodule.engine
    assert isinstance(engine, rft.VLLMEngine)
    assert (engine.dtype, engine.max_num_seqs, engine.enforce_eager) == ("bfloat16", 256, False)
    assert cli.trainer.precision == "bf16-mixed" and cli.model.gradient_checkpointing
    assert "not run on a GPU yet" in (EXAMPLES / "gpu.yaml").read_text()


def test_examples_say_how_to_run_them() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(CONFIGS)
    for name in STRATEGIES:
        assert f"make train CONFIG=examples/{name}.yaml" in (EXAMPLES / f"{name}.yaml").read_text()


def test_examples_tasks() -> None:
    train, held_out = (read_jsonl(EXAMPLES / "sums" / f"{name}.jsonl") for name in ("train", "held_out"))
    asked = [task.prompt[0]["content"] for task in [*train, *held_out]]  # type: ignore[index]
    assert len(set(asked)) == len(asked)
    assert (len(train), len(held_out)) == (84, 100)
    for question, task in zip(asked, [*train, *held_out], strict=True):
        first, second = question.removeprefix("What is ").split("?")[0].split("+")
        assert int(task.answer) == int(first) + int(second)
