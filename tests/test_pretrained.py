"""A model's revision and its own code: the same on both sides, never by default, and no token in any file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_rft as rft
from lightning_rft.model_folder import Pretrained
from lightning_rft.report.gathered import _tokenizer
from lightning_rft.testing import tiny_model
from tests.hub import on_the_hub, use_cache, with_own_code
from tests.trainer_and_data import pool_of, quiet_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = tuple(range(10, 40))
TOKEN = "hf_the_secret_of_this_test"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    use_cache(cache, monkeypatch)
    return cache


def logprobs(policy: Any) -> list[float]:
    with torch.no_grad():
        logits = policy(torch.tensor([IDS])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()  # type: ignore[no-any-return]


def data(**settings: Any) -> rft.RFTDataModule:
    defaults: dict[str, Any] = {"tasks": ["1+1=", "2+2="], "reward": lambda completion, task: float(len(completion))}
    defaults |= {"engine": rft.TransformersEngine(dtype="float32"), "tasks_per_step": 2, "samples_per_task": 2}
    return rft.RFTDataModule(**defaults | {"max_new_tokens": 4} | settings)


def test_own_code_does_not_run_unless_it_is_trusted(tmp_path: Path) -> None:
    folder = with_own_code(tmp_path / "model", 2.0)
    engine = rft.TransformersEngine(dtype="float32")
    with pytest.raises(rft.ConfigurationError, match=r"code of its own.*RFTModule\(trust_remote_code=True\)"):
        rft.RFTModule(folder).configure_model()
    with pytest.raises(rft.ConfigurationError, match=r"RFTModule\(trust_remote_code=True\)"):
        engine.start(str(folder), max_model_len=64, seed=0)
    explored = data(engine=engine)
    with pytest.raises(rft.ConfigurationError, match=r"RFTModule\(trust_remote_code=True\)"):
        quiet_trainer(tmp_path, rft.Synchronous(), max_steps=1).fit(rft.RFTModule(folder), explored)
    assert not list(tmp_path.rglob("explorer*.log")) and not pool_of(explored).assigned, "before any process starts"
    assert not (tmp_path / "hub" / "modules").exists()


def test_trusted_code_computes_in_trainer_and_engine_and_is_saved_too(tmp_path: Path) -> None:
    folder = with_own_code(tmp_path / "model", 2.0)
    module = rft.RFTModule(folder, trust_remote_code=True)
    module.configure_model()
    module.save_pretrained(tmp_path / "saved")
    # the same weights, as a plain llama
    plain = tiny_model(tmp_path / "plain")
    expected = logprobs(module.policy)
    assert max(abs(a - b) for a, b in zip(expected, logprobs(Pretrained(str(plain)).load()), strict=True)) > 0.1
    for place in (folder, tmp_path / "saved"):
        engine = rft.TransformersEngine(dtype="float32", device="cpu")
        engine.start(Pretrained(str(place), trust_remote_code=True), max_model_len=64, seed=0)
        assert engine.prompt_logprobs(IDS) == pytest.approx(expected, abs=1e-5)
        engine.stop()


def test_made_without_weights_by_the_code_of_the_revision(tmp_path: Path, hub_cache: Path) -> None:
    name = on_the_hub(hub_cache, {"main": with_own_code(tmp_path / "a", 3.0), "v1": with_own_code(tmp_path / "b", 2.0)})
    for revision, scale in (("v1", 2.0), (None, 3.0)):
        model = Pretrained(name, revision, trust_remote_code=True)
        with torch.device("meta"):
            made = model.made(model.config())
        assert made.scale == scale and type(made) is type(model.load()), revision


def test_a_run_with_a_revision_and_a_token(tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, config, code and tokenizer of the revision on both sides; with those of another, the push would fail."""
    newest, before = with_own_code(tmp_path / "a", 3.0, vocab_size=160), with_own_code(tmp_path / "b", 2.0, seed=1)
    (before / "chat_template.jinja").write_text("{% for message in messages %}v1 {{ message['content'] }}{% endfor %}")
    name = on_the_hub(hub_cache, {"main": newest, "v1": before})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    chat = [{"role": "user", "content": "1+1="}]
    explored = data(tasks=[{"prompt": chat}] * 2, reward=lambda completion, task: float("HF_TOKEN" in os.environ))

    def fit(revision: str | None, steps: int, resume: Path | None = None) -> rft.RFTModule:
        module = rft.RFTModule(name, revision=revision, trust_remote_code=True)
        checkpoints = ModelCheckpoint(every_n_train_steps=1, filename="{step}")
        logger = CSVLogger(tmp_path, f"run-{revision}", "")
        trainer = quiet_trainer(tmp_path, rft.Synchronous(), checkpoints, logger=logger, max_steps=steps)
        trainer.fit(module, explored, ckpt_path=resume)
        return module

    module, run = fit("v1", 1), tmp_path / "run-v1"
    assert module._policy.config.vocab_size == 128 and module._policy.scale == 2.0
    (row, *_) = rft.read_buffer(run / "rft" / "buffer.sqlite")
    tokenizer = Pretrained(name, "v1").tokenizer()
    assert row["prompt_ids"] == [tokenizer("v1 1+1=")["input_ids"]]
    assert row["reward"] == 1.0, "explorers have the token"
    assert _tokenizer(run).chat_template == tokenizer.chat_template, "the report's"

    saved = run / "checkpoints" / "step=1.ckpt"
    settings = torch.load(saved, weights_only=True)["hyper_parameters"]
    assert settings["revision"] == "v1" and "trust_remote_code" not in settings
    for file in filter(Path.is_file, run.rglob("*")):
        assert TOKEN.encode() not in file.read_bytes(), file

    with pytest.raises(rft.ConfigurationError, match=r"revision=None, but the checkpoint is of 'owner/name' at .*'v1'"):
        fit(None, 2, saved)
    assert rft.RFTModule.load_from_checkpoint(saved, trust_remote_code=True)._policy.scale == 2.0
    with pytest.raises(rft.ConfigurationError, match=r"RFTModule\(trust_remote_code=True\)"):
        rft.RFTModule.load_from_checkpoint(saved)


def test_a_revision_is_of_the_hub_and_of_one_model(tmp_path: Path, tiny_model_path: Path) -> None:
    with pytest.raises(rft.ConfigurationError, match="revision='v1' is for a model on the hub"):
        rft.RFTModule(tiny_model_path, revision="v1")
    module = rft.RFTModule("owner/name", revision="v1", reference=tiny_model_path, trust_remote_code=True)
    assert module.pretrained.other(module.reference) == Pretrained(str(tiny_model_path), None, trust_remote_code=True)
    assert module.pretrained.other(None) is module.pretrained


def test_what_is_not_there_points_to_the_token(hub_cache: Path) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"model='owner/name' has no tokenizer .*HF_TOKEN"):
        Pretrained("owner/name").tokenizer()


@pytest.mark.parametrize("setting", ["revision", "tokenizer_revision", "trust_remote_code", "hf_token"])
def test_vllm_is_told_in_one_place(setting: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=f"'{setting}': set (RFTModule|HF_TOKEN)"):
        rft.VLLMEngine(engine_args={setting: TOKEN}).check()
