"""The public test helpers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rft.errors import ConfigurationError
from lightning_rft.testing import tiny_model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tiny_model_loads_from_its_folder(tmp_path: Path, architecture: str, tied: bool) -> None:
    path = tiny_model(tmp_path / "a" / "b", architecture=architecture, tie_word_embeddings=tied)
    assert path == tmp_path / "a" / "b"
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)

    assert model.config.model_type == architecture
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings.data_ptr() == head.data_ptr()) is tied
    assert model.model.layers[0].self_attn.head_dim == 32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size == 128

    text = "12 + 7 =\nWhy? {a: [~]}"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert all(tokenizer.decode([index]) for index in range(128))


def test_tiny_model_chat_template_uses_single_special_tokens(tiny_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be.<|end|><|user|>hi<|end|><|assistant|>"
    assert len(tokenizer(text).input_ids) == 3 + len("Be.hi") + 2
    assert tokenizer.decode(tokenizer("hi<|end|>").input_ids, skip_special_tokens=True) == "hi"


def test_tiny_model_follows_the_seed_and_leaves_the_global_one_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    states = [
        AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / str(index), seed=seed)).state_dict()
        for index, seed in enumerate([0, 0, 1])
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_tiny_model_takes_a_larger_vocabulary(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, vocab_size=500)
    assert len(AutoTokenizer.from_pretrained(path)) == 500


@pytest.mark.parametrize(("setting", "value"), [("architecture", "gpt5"), ("vocab_size", 101)])
def test_tiny_model_refuses(tmp_path: Path, setting: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=setting):
        tiny_model(tmp_path, **{setting: value})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
