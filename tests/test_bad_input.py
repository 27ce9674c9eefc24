"""What cannot work is refused before any process starts, by an error that names the setting and says what to do."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoTokenizer

import lightning_rft as rft
from lightning_rft.renamed import MOVED
from lightning_rft.rewards import last_number
from tests.processes import Zygote
from tests.trainer_and_data import quiet_trainer


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*_: Any, **__: Any) -> None:
        pytest.fail("an explorer process was started")

    monkeypatch.setattr("lightning_rft.explorer.local.spawn", spawn)


def reward(completion: str, task: rft.Task) -> float:
    return 1.0


def make_data(**settings: Any) -> rft.RFTDataModule:
    defaults: dict[str, Any] = {"tasks": ["1 + 1 ="], "reward": reward, "engine": rft.FakeEngine(), "max_new_tokens": 8}
    return rft.RFTDataModule(**defaults | settings)


Fit = Callable[..., None]


@pytest.fixture
def fit(tmp_path: Path, tiny_model_path: Path) -> Fit:
    def fit(
        *,
        callbacks: list[Any] | None = None,
        model: Path = tiny_model_path,
        module: L.LightningModule | None = None,
        method: str = "fit",
        **settings: Any,
    ) -> None:
        trainer = quiet_trainer(
            tmp_path, *([rft.Synchronous()] if callbacks is None else callbacks), max_steps=1, limit_val_batches=None
        )
        getattr(trainer, method)(module or rft.RFTModule(model), datamodule=make_data(**settings))

    return fit


def test_what_is_refused_here_would_start_otherwise(fit: Fit) -> None:
    with pytest.raises(pytest.fail.Exception, match="an explorer process was started"):
        fit()


# What each object can know by itself


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"explorers": -1}, "explorers=-1 must be at least 1"),
        ({"tasks_per_step": 0}, "tasks_per_step=0 must be at least 1"),
        ({"samples_per_task": -2}, "samples_per_task=-2 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"sampling": rft.Sampling(temperature=0.0)}, "temperature=0.0 must be above 0 in training"),
        ({"sampling": rft.Sampling(max_new_tokens=9)}, r"max_new_tokens=8 and .*Sampling\(max_new_tokens=9\): set one"),
        ({"tasks_per_step": 4, "buffer": rft.Buffer(capacity=3)}, r"capacity=3\) .* set capacity to at least 4"),
        (
            {"samples_per_task": 4, "tolerance": rft.Tolerance(min_samples=5)},
            "min_samples=5.* at most samples_per_task",
        ),
        ({"buffer": rft.Buffer(shuffle=False)}, r"shuffle=False\) is for stored .* set tasks=TaskSet\(tasks, shuffle"),
        ({"tasks": []}, "tasks is empty: give at least one task"),
        ({"val_tasks": []}, "val_tasks is empty: give at least one task"),
        ({"tasks": [{"answer": 3}]}, r"tasks\[0\]: no `prompt` .*; give text"),
        ({"tasks": ["1", "  "]}, r"tasks\[1\]: the prompt is blank; give text"),
        ({"tasks": "nowhere.jsonl"}, "tasks cannot be read from nowhere.jsonl"),
        ({"tasks": (str(i) for i in range(3))}, r"tasks has no length: set TaskSet\(steps_per_epoch=...\)"),
        ({"reward": lambda completion: 1.0}, r"signature \(completion\).*: give a function `reward\(completion"),
        ({"reward": 1.0}, "reward is 1.0, which cannot be called: give a function"),
        ({"explorers": 0, "buffer": rft.Buffer("b", group_filter=rft.has_signal)}, "leave the buffer's group_filter"),
        ({"explorers": 0, "buffer": rft.Buffer("b", selection=rft.Priority("recency"))}, "buffer's .* selection"),
        ({"explorers": 0, "buffer": rft.Buffer("b", replay=rft.Replay())}, "buffer's .* replay"),
        ({"explorers": 0, "buffer": rft.Buffer("b", capacity=9)}, "buffer's .* capacity and keep out"),
    ],
)
def test_settings_of_the_datamodule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=message):
        make_data(**settings)


@pytest.mark.parametrize(
    ("value", "setting", "message"),
    [
        (rft.Sampling, {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        (rft.Sampling, {"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        (rft.Sampling, {"temperature": float("nan")}, "temperature=nan must be at least 0"),
        (rft.Tolerance, {"retries": -1}, "retries=-1 must be at least 0"),
        (rft.Tolerance, {"min_samples": 0}, "min_samples=0 must be at least 1"),
        (rft.Tolerance, {"max_error_rate": 0.0}, "max_error_rate=0.0 must be above 0 and at most 1"),
        (rft.Tolerance, {"max_error_rate": 1.5}, "max_error_rate=1.5 must be above 0 and at most 1"),
        (rft.Timeouts, {"reward_s": 0.0}, r"Timeouts\(reward_s=0.0\) must be above 0"),
        (rft.Timeouts, {"progress_s": float("nan")}, r"Timeouts\(progress_s=nan\) must be above 0"),
        (rft.Buffer, {"capacity": 0}, r"Buffer\(capacity=0\) must be at least 1"),
        (rft.Buffer, {"path": "{capacty: 3}"}, "is no path"),
        (rft.Buffer, {"group_filter": 1}, "group_filter is 1, which cannot be called: give a function"),
        (rft.TaskSet, {"source": ["1"], "steps_per_epoch": 0}, r"TaskSet\(steps_per_epoch=0\) must be at least 1"),
    ],
)
def test_settings_that_belong_together_check_themselves(value: type, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=message):
        value(**setting)


def test_what_sampling_leaves_out() -> None:
    data = make_data(sampling=rft.Sampling(temperature=0.8, seed=4), val_sampling=rft.Sampling(max_new_tokens=64))
    assert data.sampling == rft.Sampling(max_new_tokens=8, temperature=0.8, seed=4)
    assert data.val_sampling == rft.Sampling(max_new_tokens=64, temperature=0.0, seed=4)
    data = rft.RFTDataModule(["1 + 1 ="], reward, rft.FakeEngine())
    assert (data.sampling.max_new_tokens, data.sampling.temperature, data.val_sampling.temperature) == (256, 1.0, 0.0)


def test_old_names_are_refused_with_the_new_ones() -> None:
    known = set(inspect.signature(rft.RFTDataModule).parameters)
    assert len(known) <= 15
    assert not known & MOVED.keys()
    for name, (argument, kind, field) in MOVED.items():
        assert argument in known
        assert field in inspect.signature(getattr(rft, kind)).parameters
        with pytest.raises(rft.ConfigurationError, match=rf"^{name} moved: set {argument}={kind}\(.*{field}=\.\.\.\)"):
            make_data(**{name: None})
    with pytest.raises(TypeError, match="temperatur"):
        make_data(temperatur=1.0)


def test_a_generator_of_tasks_with_steps_per_epoch() -> None:
    data = make_data(tasks=rft.TaskSet((str(i) for i in range(1_000)), steps_per_epoch=3), tasks_per_step=2)
    assert data.steps_per_epoch == 3
    assert [data.tasks.at(position).prompt for position in (0, 5, 6)] == ["0", "5", "6"]


def test_settings_of_strategy_and_transport() -> None:
    with pytest.raises(rft.ConfigurationError, match="sync_interval=0 must be at least 1"):
        rft.Synchronous(sync_interval=0)
    with pytest.raises(rft.ConfigurationError, match=r"backend='mpi'.: use 'auto', 'nccl', 'ipc' or 'gloo'"):
        rft.CollectiveTransport(backend="mpi")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("*", "is no folder: give an existing folder or a hub name"),
        ("config.json", "has no config.json: give a folder that save_pretrained"),
        ("tokenizer*", "has no tokenizer: save it there too, with tokenizer.save_pretrained"),
    ],
)
@pytest.mark.parametrize("whose", ["module", "engine"])
def test_model_folder(without: str, message: str, whose: str, fit: Fit, tiny_model_path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    if without != "*":
        shutil.copytree(tiny_model_path, model)
        for file in model.glob(without):
            file.unlink()
    use = {"module": lambda: rft.RFTModule(model), "engine": lambda: fit(engine=rft.FakeEngine(model=str(model)))}
    with pytest.raises(rft.ConfigurationError, match=rf"model='{model}' {message}"):
        use[whose]()


# What is known when everything has come together


def test_no_strategy(fit: Fit) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"exactly one sync strategy, but has none: .*Synchronous\(\)"):
        fit(callbacks=[])


def test_two_strategies(fit: Fit) -> None:
    class Other(rft.Synchronous):
        pass

    with pytest.raises(rft.ConfigurationError, match="exactly one sync strategy, but has Synchronous and Other"):
        fit(callbacks=[rft.Synchronous(), Other()])


def test_without_vllm(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find_spec(name, *rest)
    )
    with pytest.raises(rft.ConfigurationError, match="needs vLLM, which is not installed: `pip install"):
        fit(engine=None)


def test_settings_of_the_engine(fit: Fit) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"tokens_per_second=0.*: must be positive"):
        fit(engine=rft.FakeEngine(tokens_per_second=0))


def test_one_sample_per_task(fit: Fit) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"samples_per_task=1 with GRPO.*: set samples_per_task to 2"):
        fit(samples_per_task=1)


def test_prompt_longer_than_the_context(fit: Fit) -> None:
    with pytest.raises(rft.ConfigurationError, match="prompt of 600 tokens is longer than the context of 512 tokens"):
        fit(tasks=["x" * 600])
    with pytest.raises(rft.ConfigurationError, match=r"context of 20 tokens: .* or raise the engine's max_model_len"):
        fit(tasks=["x" * 30], engine=rft.FakeEngine(max_model_len=20))


def test_answers_that_do_not_fit(fit: Fit) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"max_new_tokens=500 .* lower max_new_tokens to at most 412"):
        fit(tasks=["x" * 100], max_new_tokens=500)


def test_tasks_that_a_reward_of_ours_cannot_score(fit: Fit) -> None:
    tasks = [{"prompt": "1", "answer": 1}, {"prompt": "2", "answer": float("nan"), "id": "second"}]
    with pytest.raises(rft.ConfigurationError, match="task 'second' has none: set its `answer`"):
        make_data(tasks=tasks, reward=last_number)
    with pytest.raises(rft.ConfigurationError, match="task 'second' has none: set its `answer`"):
        make_data(val_tasks=tasks, tasks=tasks[:1], reward=last_number)


def test_chat_without_a_template(fit: Fit, tiny_model_path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_path, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    for file in model.glob("*.jinja"):
        file.unlink()
    tokenizer.save_pretrained(model)
    with pytest.raises(rft.ConfigurationError, match=r"task '0': .* no chat template .*: set tokenizer.chat_template"):
        fit(model=model, tasks=[{"prompt": [{"role": "user", "content": "Hello"}]}])


@pytest.mark.parametrize("setting", ["reward", "workflow"])
def test_what_cannot_be_pickled(fit: Fit, setting: str) -> None:
    lock = threading.Lock()

    async def function(first: Any, second: Any) -> float:
        with lock:
            return 1.0

    with pytest.raises(
        rft.ConfigurationError, match=f"^{setting} cannot be sent to an explorer process .*lock.*: keep"
    ):
        fit(**{setting: function})


class Plain(L.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


def test_other_module(fit: Fit) -> None:
    with pytest.raises(rft.ConfigurationError, match="feeds an RFTModule, not Plain: use or subclass it"):
        fit(module=Plain())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("kind", ["datamodule", "dataloader"])
def test_other_data(tmp_path: Path, tiny_model_path: Path, kind: str) -> None:
    trainer = quiet_trainer(tmp_path, rft.Synchronous(), max_steps=1)
    data = L.LightningDataModule.from_datasets([1, 2]) if kind == "datamodule" else [1, 2]
    with pytest.raises(rft.ConfigurationError, match=r"Synchronous needs an RFTDataModule: call trainer\.fit"):
        trainer.fit(rft.RFTModule(tiny_model_path), data)


@pytest.mark.parametrize("strategy", [rft.Synchronous(2), rft.OneStepOffPolicy(in_flight=True)])
def test_a_priority_where_order_is_kept(fit: Fit, strategy: rft.SyncStrategy) -> None:
    name = type(strategy).__name__
    with pytest.raises(rft.ConfigurationError, match=f"nothing to choose under {name}, which .* in the order in which"):
        fit(callbacks=[strategy], buffer=rft.Buffer(selection=rft.Priority("recency")))


@pytest.mark.parametrize("strategy", [rft.Synchronous(), rft.FullyAsynchronous(max_staleness=0)])
def test_a_replay_where_nothing_may_be_stale(fit: Fit, strategy: rft.SyncStrategy) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"\(b \+ 1\) - b = 1 batch old .* above max_staleness=0"):
        fit(callbacks=[strategy], buffer=rft.Buffer(replay=rft.Replay()))


def test_validation_without_tasks(fit: Fit) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"trainer.validate\(\) needs RFTDataModule\(val_tasks"):
        fit(method="validate")


# The package itself


def test_names() -> None:
    assert "RFTDataModule" in rft.__all__
    for name in rft.__all__:
        assert getattr(rft, name).__name__ == name
    assert set(rft.__all__) < set(dir(rft))
    with pytest.raises(AttributeError, match=r"module 'lightning_rft' has no attribute 'Asynchronous'"):
        _ = rft.Asynchronous


def test_import_is_light() -> None:
    script = """
        import sys
        import lightning_rft
        heavy = {"vllm", "transformers", "torch", "lightning"} & sys.modules.keys()
        assert not heavy, heavy
        assert "RFTDataModule" in dir(lightning_rft)
        assert lightning_rft.Sampling().temperature is None
        parts = ("sync", "trainer", "buffer", "explorer", "run")
        heavy |= {name for name in sys.modules if name.startswith(tuple(f"lightning_rft.{part}" for part in parts))}
        heavy |= {"vllm", "transformers", "torch", "lightning"} & sys.modules.keys()
        assert not heavy, heavy
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120, check=True, env=environment)


def test_vllm_is_optional(zygote: Zygote, tiny_model_path: Path, tmp_path: Path) -> None:
    script = """
        import sys
        import lightning_rft as rft
        settings = dict(tasks=["1"], reward=lambda completion, task: 1.0)
        rft.RFTDataModule(**settings, engine=rft.FakeEngine()).engine.check()
        assert "vllm" not in sys.modules
        rft.RFTDataModule(**settings).engine.check()
    """
    done = zygote.start(script, tmp_path, tiny_model_path)
    assert done.wait() == 1
    assert "ConfigurationError: engine=VLLMEngine() needs vLLM, which is not installed" in done.stderr.splitlines()[-1]
