"""The command line: what a config may say, what overrides it, and what a mistake in it looks like."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

import lightning_rft as rft
from lightning_rft.cli import RFTCLI, main
from lightning_rft.renamed import MOVED
from tests.documents import Parsed
from tests.processes import Zygote

EXAMPLES = Path(__file__).parents[1] / "examples"

Command = Callable[..., RFTCLI]


pytestmark = pytest.mark.usefixtures("one_thread", "no_seed_left_behind")


@pytest.fixture
def config(tmp_path: Path, tiny_model_path: Path) -> dict[str, Any]:
    """A config as a user would write it, with short class paths."""
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "answer": i + 1}) + "\n" for i in range(4)))
    return {
        "model": {
            "model": str(tiny_model_path),
            "objective": {"class_path": "GRPO", "init_args": {"normalisation": "token"}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
        },
        "data": {
            "tasks": str(tasks),
            "val_tasks": str(tasks),
            "reward": "lightning_rft.rewards.last_number",
            "engine": {"class_path": "tests.processes.LightEngine", "init_args": {"mean_tokens": 4}},
            "tasks_per_step": 1,
            "samples_per_task": 2,
            "max_new_tokens": 4,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "callbacks": [
                {
                    "class_path": "Synchronous",
                    "init_args": {
                        "sync_interval": 1,
                        "transport": {"class_path": "CollectiveTransport", "init_args": {"timeout_s": 60.0}},
                    },
                }
            ],
            "default_root_dir": str(tmp_path),
            "logger": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs a subcommand with a config and options, as from a shell."""

    def command(name: str, config: dict[str, Any], *options: str) -> RFTCLI:
        path = tmp_path / "given.yaml"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["lightning-rft", name, "--config", str(path), *options])
        return RFTCLI()

    return command


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What ``--print_config`` prints."""

    def printed(path: Path, *options: str) -> dict[str, Any]:
        argv = ["lightning-rft", "fit", "--config", str(path), *options, "--print_config"]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        return found

    return printed


# Runs


def test_fit(command: Command, config: dict[str, Any], tmp_path: Path) -> None:
    config["data"]["engine"] = "TransformersEngine"
    config["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "logs"}}
    config["trainer"].update(val_check_interval=2, check_val_every_n_epoch=None)
    cli = command("fit", config)

    assert cli.trainer.global_step == 2
    assert isinstance(cli.model, rft.RFTModule) and isinstance(cli.datamodule, rft.RFTDataModule)
    assert cli.model.objective == rft.GRPO(normalisation="token")
    assert isinstance(cli.datamodule.engine, rft.TransformersEngine)
    assert cli.datamodule.sampling.seed == 0  # runs are seeded unless one asks for something else
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["initial_lr"] == 0.5
    (scheduler,) = cli.trainer.lr_scheduler_configs
    assert isinstance(scheduler.scheduler, torch.optim.lr_scheduler.StepLR)
    (strategy,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, rft.SyncStrategy)]
    assert isinstance(strategy, rft.Synchronous)
    assert isinstance(strategy.transport, rft.CollectiveTransport) and strategy.transport.timeout_s == 60.0

    assert isinstance(cli.trainer.logger, CSVLogger)
    with open(Path(cli.trainer.logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["rft/reward"]]) == 2
    assert len([row for row in rows if row["val/reward"]]) == 1


def test_options_override_the_config(command: Command, config: dict[str, Any]) -> None:
    cli = command("fit", config, "--trainer.max_steps", "1", "--data.tasks_per_step=2", "--seed_everything", "7")
    assert cli.trainer.global_step == 1
    assert cli.datamodule.tasks_per_step == 2
    assert cli.datamodule.sampling.seed == 7


def test_validate(command: Command, config: dict[str, Any]) -> None:
    cli = command("validate", config)
    measured = ("reward", "pass_at_1", "pass@1", "completion_length", "truncated_share", "version")
    assert set(cli.trainer.callback_metrics) == {f"val/{name}" for name in measured}


def test_the_saved_config_repeats_the_run_in_the_same_folder(
    command: Command, config: dict[str, Any], tmp_path: Path
) -> None:
    command("fit", config)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["seed_everything"] == 0
    command("fit", saved)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == saved


def test_policies_of_the_buffer(
    printed: Callable[..., dict[str, Any]], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given.yaml"
    for score, expected in [("recency", "recency"), ("lightning_rft.reward_variance", rft.reward_variance)]:
        config["data"]["buffer"] = {
            "group_filter": "lightning_rft.has_signal",
            "selection": {"class_path": "Priority", "init_args": {"score": score}},
            "replay": {"class_path": "Replay", "init_args": {"groups": 3}},
        }
        given.write_text(yaml.safe_dump(config))
        config = printed(given)  # which must mean the same
        monkeypatch.setattr(sys, "argv", ["notebook"])
        args = {name: value for name, value in config.items() if name in ("model", "data", "trainer")}
        data = RFTCLI(args=args, run=False, seed_everything_default=False).datamodule
        buffer = data.buffer
        assert buffer.group_filter is rft.has_signal
        assert isinstance(buffer.selection, rft.Priority) and isinstance(buffer.replay, rft.Replay)
        assert buffer.selection.score == expected
        assert (buffer.replay.times, buffer.replay.groups) == (2, 3)


def test_settings_that_belong_together(
    printed: Callable[..., dict[str, Any]], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given.yaml"
    config["data"] |= {
        "tasks": {"source": config["data"]["tasks"], "shuffle": False},
        "sampling": {"temperature": 0.8},
        "val_sampling": {"class_path": "Sampling", "init_args": {"max_new_tokens": 6}},
        "tolerance": {"retries": 1},
        "buffer": "explored.sqlite",
    }
    given.write_text(yaml.safe_dump(config))
    options = ["--data.sampling.seed", "5", "--data.timeouts.reward_s", "2", "--data.tolerance.max_error_rate=0.5"]
    config = printed(given, *options)
    defaults = {"sample_s": None, "start_s": 600.0, "progress_s": 600.0, "workflow_s": 600.0, "sleep_s": 120.0}
    assert config["data"]["timeouts"] == {"reward_s": 2.0, **defaults}
    given.write_text(yaml.safe_dump(config))
    assert printed(given) == config
    monkeypatch.setattr(sys, "argv", ["notebook"])
    args = {name: value for name, value in config.items() if name in ("model", "data", "trainer")}
    data = RFTCLI(args=args, run=False, seed_everything_default=False).datamodule
    assert data.sampling == rft.Sampling(max_new_tokens=4, temperature=0.8, seed=5)
    assert data.val_sampling == rft.Sampling(max_new_tokens=6, temperature=0.0, seed=5)
    assert data.tolerance == rft.Tolerance(retries=1, max_error_rate=0.5)
    assert data.timeouts == rft.Timeouts(reward_s=2.0)
    assert data.buffer == rft.Buffer("explored.sqlite")
    assert not data.task_set.shuffle and len(data.tasks) == 4


def test_a_printed_config_prints_itself(
    printed: Callable[..., dict[str, Any]], config: dict[str, Any], tmp_path: Path
) -> None:
    given, again = tmp_path / "given.yaml", tmp_path / "again.yaml"
    given.write_text(yaml.safe_dump(config))
    first = printed(given)
    assert first["trainer"]["callbacks"][0]["class_path"] == "lightning_rft.Synchronous"
    assert first["model"]["objective"]["class_path"] == "lightning_rft.GRPO"
    assert first["data"]["reward"] == "lightning_rft.rewards.last_number"
    again.write_text(yaml.safe_dump(first))
    assert printed(again) == first


def test_a_sum_of_rewards_in_a_config(
    printed: Callable[..., dict[str, Any]],
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    parts = {"right": "lightning_rft.rewards.last_number", "letters": "tests.processes.share_of_letters"}
    settings = {"parts": parts, "weights": {"letters": 0.5}}
    config["data"]["reward"] = {"class_path": "RewardSum", "init_args": settings}
    given = tmp_path / "given.yaml"
    given.write_text(yaml.safe_dump(config))
    assert printed(given)["data"]["reward"] == {"class_path": "lightning_rft.RewardSum", "init_args": settings}
    monkeypatch.setattr(sys, "argv", ["notebook"])
    reward = RFTCLI(args=config, run=False, seed_everything_default=False).datamodule.reward
    assert reward("3", rft.Task("1 + 2 =", answer=3)) == rft.Score(1.0, {"right": 1.0, "letters": 0.0})


def test_lightnings_own_command_line(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_path: Path
) -> None:
    config["model"]["objective"]["class_path"] = "lightning_rft.GRPO"
    (strategy,) = config["trainer"]["callbacks"]
    strategy["class_path"] = "lightning_rft.Synchronous"
    strategy["init_args"]["transport"]["class_path"] = "lightning_rft.CollectiveTransport"
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["script.py", "fit", "--config", str(path)])
    cli = LightningCLI(rft.RFTModule, rft.RFTDataModule, seed_everything_default=0)
    assert cli.trainer.global_step == 2
    assert isinstance(cli.trainer.optimizers[0], torch.optim.SGD)


def test_objects_without_a_run(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["notebook"])

    class Mine(rft.RFTDataModule):
        pass

    cli = RFTCLI(datamodule_class=Mine, args=config, run=False, seed_everything_default=False)
    assert isinstance(cli.datamodule, Mine)
    assert cli.trainer.max_steps == 2


@pytest.mark.parametrize(
    ("options", "filled"),
    [
        (["fit", "--config", "fit.yaml"], 1),
        (["--config", "all.yaml", "fit"], 6),
        (["--config", "all.yaml"], 6),
    ],
    ids=["first", "last", "in a file"],
)
def test_only_a_subcommand_that_may_be_chosen_gets_its_options(
    options: list[str], filled: int, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those of all would be most of the time that passes before a run begins."""

    class Counts(Parsed):
        filled = 0

        def add_core_arguments_to_parser(self, parser: Any) -> None:
            self.filled += 1
            super().add_core_arguments_to_parser(parser)

    config["data"]["tasks_per_step"] = 3
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"fit": config}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-rft", *options])
    cli = Counts()
    assert (cli.config.subcommand, cli.config.fit.data.tasks_per_step) == ("fit", 3)
    assert cli.config.fit.model.objective.init_args.normalisation == "token"
    assert cli.filled == filled


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.nope", "1"], "--data.nope"),
        (["--data.explorers", "many"], '"data.explorers"'),
        (["--trainer.callbacks", "Synchronus"], "Synchronus"),
        (["--data.engine", "NoEngine"], "NoEngine"),
        (["--data.reward", "lightning_rft.rewards.no_such"], "no_such"),
        # what the parser cannot know
        (["--data.sampling.temperature", "0"], "error: temperature=0.0 must be above 0"),
        (["--data.sampling.temperature", "-1"], "error: temperature=-1.0 must be at least 0"),
        (["--data.buffer.capacity", "-1"], "error: Buffer(capacity=-1) must be at least 1"),
        (["--data.buffer", "{capacty: 3}"], "error: buffer='{capacty: 3}' is no path"),
        (["--data.tasks", "nowhere.jsonl"], "error: tasks cannot be read from nowhere.jsonl"),
        (["--model.model", "./nowhere"], "error: model='./nowhere' is no folder"),
        (["--model.objective.normalisation", "0"], "error: normalisation=0 must be at least 1"),
        (["--model.objective.clip_low", "0.1"], "model.objective.clip_low moved: set model.objective.surrogate.low"),
        (["--trainer.callbacks.sync_interval", "0"], "error: sync_interval=0 must be at least 1"),
        (["--trainer.limit_train_batches", "1.5"], "error: You have passed invalid value 1.5 for limit_train_batches"),
    ],
)
def test_a_mistake_ends_with_a_short_message(
    command: Command, config: dict[str, Any], capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        command("fit", config, *options)
    said = capfd.readouterr().err
    assert end.value.code == 2
    assert message in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 20, said


def test_an_unknown_key_in_a_file(command: Command, config: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    config["data"]["task_per_step"] = 3
    with pytest.raises(SystemExit) as end:
        command("fit", config)
    assert end.value.code == 2
    assert "task_per_step" in capfd.readouterr().err


@pytest.mark.parametrize("where", ["file", "option", "file of its own"])
@pytest.mark.parametrize("name", MOVED)
def test_an_old_name(
    command: Command, config: dict[str, Any], capfd: pytest.CaptureFixture[str], tmp_path: Path, name: str, where: str
) -> None:
    options: list[str] = []
    if where == "file":
        config["data"][name] = 1
    elif where == "option":
        options = [f"--data.{name}", "1"]
    else:
        (tmp_path / "data.yaml").write_text(yaml.safe_dump({name: 1}))
        options = ["--data", str(tmp_path / "data.yaml")]
    with pytest.raises(SystemExit) as end:
        command("fit", config, *options)
    argument, _, field = MOVED[name]
    assert end.value.code == 2
    assert f"error: data.{name} moved: set data.{argument}.{field}, in a file {argument}: {{" in capfd.readouterr().err


def test_other_subcommands_are_refused(
    command: Command, config: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command("test", config)
    assert end.value.code == 2
    assert "fit" in capfd.readouterr().err


def test_a_run_needs_a_strategy(command: Command, config: dict[str, Any]) -> None:
    config["trainer"]["callbacks"] = []
    with pytest.raises(rft.ConfigurationError, match=r"needs exactly one sync strategy, but has none"):
        command("fit", config)


# Processes of their own


def test_help_is_quick_to_say_what_there_is() -> None:
    script = "import runpy, sys; sys.argv[1:] = ['--help']\n"
    script += "try: runpy.run_module('lightning_rft', run_name='__main__')\n"
    script += "finally: print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("fit", "validate", "explore"))
    assert "predict" not in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_sigterm(zygote: Zygote, config: dict[str, Any], tmp_path: Path, tiny_model_path: Path) -> None:
    """Exits with 143, and finds the reward in a file of the current folder."""
    (tmp_path / "here.py").write_text(
        "from tests.processes import touch\n"
        "def reward(completion, task):\n"
        "    touch('rewarded')\n"
        "    return float(len(completion) % 2)\n"
    )
    config["data"]["reward"] = "here.reward"
    config["trainer"]["max_steps"] = 10**6
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(config))
    script = zygote.start(
        """
        import sys
        from lightning_rft.__main__ import main
        sys.argv += ["fit", "--config", "given.yaml"]
        main()
        """,
        tmp_path,
        tiny_model_path,
    )
    try:
        script.wait_for("rewarded")
        script.signal(15)
        assert script.wait() == 143, script.stderr
        script.gone()
    finally:
        script.kill()


def test_a_config_with_vllm_does_not_import_it(zygote: Zygote, tmp_path: Path, tiny_model_path: Path) -> None:
    """It is the explorers' to import: it takes seconds, and a gigabyte."""
    script = zygote.start(
        f"""
        import sys
        from lightning_rft.__main__ import main
        class Watch:
            @staticmethod
            def find_spec(name, *_):
                if name == "vllm":
                    print("vllm was asked for", file=sys.stderr)
        sys.meta_path.insert(0, Watch)
        sys.argv += ["fit", "--config", {str(EXAMPLES / "synchronous.yaml")!r}, "--print_config"]
        main()
        """,
        tmp_path,
        tiny_model_path,
    )
    assert script.wait() == 0, script.stderr
    assert "vllm was asked for" not in script.stderr


# Adapters

ADAPTER = {"r": 2, "target_modules": "all-linear"}


@pytest.mark.parametrize("given", [ADAPTER, {"class_path": "peft.LoraConfig", "init_args": ADAPTER}], ids=str)
def test_an_adapter_in_a_config(
    given: dict[str, Any],
    printed: Callable[..., dict[str, Any]],
    command: Command,
    config: dict[str, Any],
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    config["model"]["peft_config"] = given
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(config))
    shown = printed(path)
    assert shown["model"]["peft_config"] == given
    path.write_text(yaml.safe_dump(shown))
    assert printed(path) == shown
    assert command("fit", shown).model.peft_config == ADAPTER


def test_an_adapter_by_options_and_none_without_peft(
    printed: Callable[..., dict[str, Any]], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # parsing does not import it
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(config))
    options = ["--model.peft_config.r", "2", "--model.peft_config.target_modules", "all-linear"]
    assert printed(path, *options)["model"]["peft_config"] == ADAPTER
    assert printed(path)["model"]["peft_config"] is None
