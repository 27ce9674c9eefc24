"""Exploring into a buffer without training, by ``trainer.predict`` and by the command line."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger, State
from tests.processes import Script, Zygote
from tests.trainer_and_data import SUMS, fake_data, quiet_trainer, stored_data

pytestmark = pytest.mark.usefixtures("one_thread")

STRATEGIES: dict[str, Callable[[], rft.SyncStrategy]] = {
    "Synchronous": rft.Synchronous,
    "FullyAsynchronous": lambda: rft.FullyAsynchronous(max_staleness=2, transport=rft.CheckpointTransport()),
    "MultiExplorerAsynchronous": lambda: rft.MultiExplorerAsynchronous(max_staleness=2),
}


def make_data(folder: Path, **changes: Any) -> rft.RFTDataModule:
    settings: dict[str, Any] = {
        "reward": lambda completion, task: 1 / 0 if task.answer == "bad" else float(len(completion) % 3),
        "buffer": folder / "explored.sqlite",
        "sampling": rft.Sampling(seed=3),
    }
    return fake_data(**settings | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rft.RFTDataModule]:
    """Its explorers serve several runs; each sets where its buffer is."""
    with make_data(tmp_path_factory.mktemp("shared"), explorers=2) as data:
        yield data


def explore(
    data: rft.RFTDataModule, model: Path, folder: Path, strategy: rft.SyncStrategy | None = None, **settings: Any
) -> list[list[dict[str, Any]]]:
    trainer = quiet_trainer(folder, strategy or rft.Synchronous(), **settings)
    found: list[list[dict[str, Any]]] = trainer.predict(rft.RFTModule(model), data)  # type: ignore[assignment]
    return found


def samples(buffer: Path, run: int | None = None) -> Counter[tuple[Any, ...]]:
    """What the buffer holds to train on: the samples of its ready groups."""
    rows = rft.read_buffer(buffer)
    return Counter(
        (row["task_id"], row["sample"], row["text"], row["reward"], str(row["token_ids"]))
        for row in rows
        if row["state"] == "ready" and run in (None, row["run"])
    )


class Looks(rft.RFTModule):
    """Notes the samples that it was trained on."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.seen: Counter[tuple[Any, ...]] = Counter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for group in batch.groups:
            for experience in group.experiences:
                ids = str([turn.token_ids.tolist() for turn in experience.turns])
                self.seen[group.task_id, experience.sample, experience.text, experience.reward, ids] += 1
        return super().training_step(batch, batch_idx)


def train_from(buffer: Path, model: Path, folder: Path) -> Counter[tuple[Any, ...]]:
    """The samples that an epoch without explorers trains on."""
    module = Looks(model)
    quiet_trainer(folder, max_epochs=1).fit(module, stored_data(buffer))
    return module.seen


@torch.no_grad()
def score(policy: torch.nn.Module, prompt: list[int], sampled: list[int]) -> list[float]:
    """Log-probs of sampled tokens."""
    logits = policy(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1]
    chosen: list[float] = logits.log_softmax(-1)[range(len(sampled)), sampled].tolist()
    return chosen


def counts(buffer: Path) -> dict[State, int]:
    """Groups of the last run, by state; only those of which there are any."""
    with Ledger.open(buffer) as ledger:
        return {state: count for state, count in ledger.counts().items() if count}


# What is explored


@pytest.mark.parametrize("capacity", [None, 4])
def test_explores_every_task_once_and_trains_exactly_that(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, capacity: int | None
) -> None:
    data.buffer = rft.Buffer(path := tmp_path / "new.sqlite", capacity)
    predicted = explore(data, tiny_model_path, tmp_path)

    assert [len(batch) for batch in predicted] == [8, 8, 4]  # ten tasks of two samples, four tasks a batch
    stored = samples(path)
    assert Counter((row["task_id"], row["sample"], row["text"], row["reward"]) for b in predicted for row in b) == (
        Counter({key[:4]: count for key, count in stored.items()})
    )
    assert Counter(key[0] for key in stored) == Counter({str(index): 2 for index in range(10)})
    assert counts(path) == {State.READY: 10}
    assert {row["oldest_version"] for row in rft.read_buffer(path)} == {0}
    assert train_from(path, tiny_model_path, tmp_path) == stored
    assert counts(path) == {State.READY: 10}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_strategy_lends_its_transport(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, strategy: str
) -> None:
    data.buffer = rft.Buffer(path := tmp_path / "new.sqlite")
    explore(data, tiny_model_path, tmp_path, STRATEGIES[strategy]())
    assert counts(path) == {State.READY: 10}


def test_explores_with_the_weights_of_the_module_or_a_checkpoint(tiny_model_path: Path, tmp_path: Path) -> None:
    module = rft.RFTModule(tiny_model_path)
    module.configure_model()
    assert module.policy is not None
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    data = make_data(tmp_path, tasks=SUMS[:2], engine=rft.TransformersEngine(dtype="float32"))
    with data:
        trainer = quiet_trainer(tmp_path, rft.Synchronous())
        trainer.predict(module, data)
        trainer.save_checkpoint(tmp_path / "changed.ckpt", weights_only=True)
        again = quiet_trainer(tmp_path, rft.Synchronous())
        again.predict(rft.RFTModule(tiny_model_path), data, ckpt_path=tmp_path / "changed.ckpt")
    assert samples(tmp_path / "explored.sqlite", run=1) == samples(tmp_path / "explored.sqlite", run=2) != Counter()
    original = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    for row in rft.read_buffer(tmp_path / "explored.sqlite"):
        (prompt,), (sampled,), (logprobs,) = row["prompt_ids"], row["token_ids"], row["logprobs"]
        assert logprobs == pytest.approx(score(module.policy, prompt, sampled), abs=1e-4)
        assert logprobs != pytest.approx(score(original, prompt, sampled), abs=1e-3)


def test_limits_and_precision(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    data.buffer = rft.Buffer(path := tmp_path / "new.sqlite")
    explore(data, tiny_model_path, tmp_path, limit_predict_batches=2, precision="bf16-true")
    assert counts(path) == {State.READY: 8}
    assert explore(data, tiny_model_path, tmp_path, limit_predict_batches=0) is None
    assert counts(path) == {State.READY: 8}


def test_a_second_time_adds_to_the_file(tiny_model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "explored.sqlite"
    with make_data(tmp_path, tasks=rft.TaskSet(SUMS, shuffle=False)) as data:
        explore(data, tiny_model_path, tmp_path)
        first = samples(path)
        # a run that trains comes between: what it leaves ready is its own, and what was there stays
        quiet_trainer(tmp_path, rft.Synchronous(), max_steps=1).fit(rft.RFTModule(tiny_model_path), data)
        assert samples(path, run=1) == first
        data.sampling = replace(data.sampling, seed=4)
        explore(data, tiny_model_path, tmp_path)
    assert samples(path, run=1) == first
    second = samples(path, run=3)
    assert second != first
    trained = Counter(
        (row["task_id"], row["sample"], row["text"], row["reward"], str(row["token_ids"]))
        for row in rft.read_buffer(path)
        if row["run"] == 2 and row["state"] == "trained"
    )
    assert trained
    assert train_from(path, tiny_model_path, tmp_path) == first + second + trained


def test_after_a_fit_with_its_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    """The version is that of the weights, and a checkpoint saved afterwards still goes on with the fit."""
    with make_data(tmp_path) as data:
        trainer = quiet_trainer(tmp_path, rft.Synchronous(), max_steps=2)
        module = rft.RFTModule(tiny_model_path)
        trainer.fit(module, data)
        trainer.predict(module, data)
        trainer.save_checkpoint(tmp_path / "late.ckpt")
        rows = [row for row in rft.read_buffer(tmp_path / "explored.sqlite") if row["run"] == 2]
        assert {row["oldest_version"] for row in rows} == {row["newest_version"] for row in rows} == {2}
        assert len(rows) == 20
        again = quiet_trainer(tmp_path, rft.Synchronous(), max_steps=3)
        again.fit(rft.RFTModule(tiny_model_path), data, ckpt_path=tmp_path / "late.ckpt")
    found = rft.read_buffer(tmp_path / "explored.sqlite", tokens=False)
    trained = {(row["run"], row["task_id"]) for row in found if row["state"] == "trained"}
    assert trained == {(1, str(index)) for index in range(10)}


# What goes wrong


def test_tasks_that_fail_are_replaced_and_counted(
    tiny_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [rft.Task(prompt, answer="bad" if index in (2, 5) else None) for index, prompt in enumerate(SUMS)]
    data = make_data(tmp_path, tasks=rft.TaskSet(tasks, False), tolerance=rft.Tolerance(0, max_error_rate=1.0))
    with caplog.at_level(logging.INFO):
        explore(data, tiny_model_path, tmp_path, limit_predict_batches=2)
    assert counts(tmp_path / "explored.sqlite") == {State.READY: 8, State.FAILED: 2}
    explored = Counter(key[0] for key in samples(tmp_path / "explored.sqlite"))
    assert explored == Counter({str(index): 2 for index in (0, 1, 3, 4, 6, 7, 8, 9)})
    (line,) = [record.message for record in caplog.records if record.message.startswith("Explored")]
    assert line.startswith("Explored 8 groups into ")
    assert "2 tasks failed" in line


def test_too_many_failures_end_it(tiny_model_path: Path, tmp_path: Path) -> None:
    tasks = [rft.Task(prompt, answer="bad" if index > 2 else None) for index, prompt in enumerate(SUMS)]
    data = make_data(tmp_path, tasks=rft.TaskSet(tasks, False), tolerance=rft.Tolerance(0), tasks_per_step=2)
    with pytest.raises(ZeroDivisionError):
        explore(data, tiny_model_path, tmp_path)
    assert set(counts(tmp_path / "explored.sqlite")) >= {State.READY, State.FAILED}


def test_what_cannot_work(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"buffer=':memory:' would be gone .* set buffer to a file"):
        explore(make_data(tmp_path, buffer=":memory:"), tiny_model_path, tmp_path)
    with pytest.raises(rft.ConfigurationError, match="needs exactly one sync strategy, but has none"):
        quiet_trainer(tmp_path).predict(rft.RFTModule(tiny_model_path), make_data(tmp_path))
    with Ledger.open(tmp_path / "explored.sqlite") as held:
        held.begin()
        with pytest.raises(rft.ConfigurationError, match="in use by another run"):
            explore(make_data(tmp_path), tiny_model_path, tmp_path)


def test_no_explorers_explore_nothing(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    data.buffer = rft.Buffer(path := tmp_path / "new.sqlite")
    explore(data, tiny_model_path, tmp_path, limit_predict_batches=1)
    stored = rft.RFTDataModule(explorers=0, buffer=path)
    with pytest.raises(rft.ConfigurationError, match="explorers=0 has nobody who explores"):
        explore(stored, tiny_model_path, tmp_path)


SCRIPT = """
    import os
    import lightning as L
    import lightning_rft as rft
    from tests.processes import MODEL, LightEngine, touch
    from tests.trainer_and_data import fake_data, quiet_trainer

    class Announce(L.Callback):
        def on_predict_batch_end(self, *arguments):
            touch("explored")

    data = fake_data(
        tasks=[f"{{index}} + 1 =" for index in range(10_000)], engine=LightEngine({engine}),
        tasks_per_step=2, max_new_tokens=8, timeouts=rft.Timeouts(start_s=60.0),
    )
    trainer = quiet_trainer(os.getcwd(), Announce(), rft.{strategy}, {trainer})
    trainer.predict(rft.RFTModule(os.environ[MODEL]), data, return_predictions=False)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_cut_short_what_was_explored_can_be_used(
    start: Callable[[str], Script], tiny_model_path: Path, tmp_path: Path, number: int, status: int
) -> None:
    script = start(SCRIPT.format(engine="tokens_per_second=400, mean_tokens=5", strategy="Synchronous()", trainer=""))
    script.wait_for("explored")
    script.signal(number)
    assert script.wait() == status, script.stderr
    stored = samples(tmp_path / "rft" / "buffer.sqlite")
    assert len(stored) >= 4
    if number != signal.SIGKILL:
        (line,) = [line for line in script.stderr.splitlines() if line.startswith("Explored ")]
        assert line.startswith(f"Explored {len(stored) // 2} groups into ")
        assert "set explorers=0 and buffer='" in line
    assert train_from(tmp_path / "rft" / "buffer.sqlite", tiny_model_path, tmp_path) == stored


@pytest.mark.parametrize("strategy", ["Synchronous()", "FullyAsynchronous(max_staleness=1)"])
def test_an_explorer_that_dies_is_replaced(start: Callable[[str], Script], tmp_path: Path, strategy: str) -> None:
    engine = "tokens_per_second=60, mean_tokens=5"
    script = start(SCRIPT.format(engine=engine, strategy=strategy, trainer="limit_predict_batches=8"))
    script.wait_for("explored")
    (explorer,) = script.children("lightning_rft.explorer.worker.main")
    os.kill(explorer, signal.SIGKILL)
    assert script.wait() == 0, script.stderr
    assert "another explorer is started" in script.stderr
    assert counts(tmp_path / "rft" / "buffer.sqlite") == {State.READY: 16}
    versions = {row["oldest_version"] for row in rft.read_buffer(tmp_path / "rft" / "buffer.sqlite")}
    assert versions == {0}


# The command line


@pytest.fixture
def config(tmp_path: Path, tiny_model_path: Path) -> Path:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "answer": i + 1}) + "\n" for i in range(6)))
    path = tmp_path / "given.yaml"
    blocks = {
        "model": {"model": str(tiny_model_path)},
        "data": {
            "tasks": str(tasks),
            "val_tasks": str(tasks),
            "reward": "lightning_rft.rewards.last_number",
            "engine": {"class_path": "tests.processes.LightEngine", "init_args": {"mean_tokens": 4}},
            "tasks_per_step": 2,
            "samples_per_task": 2,
            "max_new_tokens": 4,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "callbacks": [{"class_path": "Synchronous"}],
            "default_root_dir": str(tmp_path),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    path.write_text(yaml.safe_dump(blocks))
    return path


def run_command(zygote: Zygote, folder: Path, model: Path, *arguments: str) -> Script:
    script = zygote.start(
        f"""
        import sys
        from lightning_rft.__main__ import main
        sys.argv += {list(arguments)!r}
        main()
        """,
        folder,
        model,
    )
    try:
        script.wait()
        script.gone()
    finally:
        script.kill()
    return script


def test_command_line(zygote: Zygote, config: Path, tmp_path: Path, tiny_model_path: Path) -> None:
    """The config of a fit explores, and with the settings that the last line names it trains on that."""
    script = run_command(zygote, tmp_path, tiny_model_path, "explore", "--config", str(config))
    assert script.status == 0, script.stderr
    path = tmp_path / "rft" / "buffer.sqlite"
    assert f"Explored 6 groups into {path}, 0 tasks failed. The file holds 6 groups" in script.stderr
    assert counts(path) == {State.READY: 6}

    options = [f"--data.buffer={path}", "--data.explorers=0", "--data.val_tasks=null", "--trainer.callbacks=null"]
    script = run_command(zygote, tmp_path, tiny_model_path, "fit", "--config", str(config), *options)
    assert script.status == 0, script.stderr


def test_command_line_with_a_trainer_of_its_own(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Mine(L.Trainer):
        pass

    monkeypatch.setattr(sys, "argv", ["mine", "explore", "--config", str(config), "--data.buffer", "mine.sqlite"])
    monkeypatch.chdir(tmp_path)
    cli = rft.RFTCLI(trainer_class=Mine)
    assert isinstance(cli.trainer, Mine)
    assert counts(tmp_path / "mine.sqlite") == {State.READY: 6}
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["data"]["buffer"] == "mine.sqlite"
