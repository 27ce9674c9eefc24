"""Models of many kinds: after a push an engine computes what the trainer's model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.explorer.in_process import InProcess
from tests.explorer.links import MemoryLink

torch = pytest.importorskip("torch")

# What each kind needs beside the common sizes. The vocabulary of the first is no multiple of what vLLM pads to.
KINDS: dict[str, dict[str, Any]] = {
    "granite": {"num_key_value_heads": 1, "vocab_size": 131},
    "mixtral": {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_inner": 128, "n_positions": 512},
    "llama": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 32},
    "qwen3_moe": {
        **{"num_key_value_heads": 1, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    },
    "olmoe": {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "phi3": {"num_key_value_heads": 1},
    "cohere": {"num_key_value_heads": 1, "logit_scale": 1.0},
}
OFTEN = ["granite", "mixtral", "gemma2", "gpt2"]
PROMPT = [10 + index * 7 % 90 for index in range(100)]


def write(kind: str, folder: Path, seed: int) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lightning_rft.testing import tiny_model

    common = {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        "max_position_embeddings": 512,
    }
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.1}
    config = AutoConfig.for_model(
        kind, **{"vocab_size": 128, **({} if kind == "gpt2" else common), **special, **KINDS[kind]}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms, which are all alike when they are new
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    tiny_model(folder, vocab_size=config.vocab_size)
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink()  # which says what the config says
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gaps(engine: str, old: str, new: str, ranks: int) -> dict[str, float]:
    """Largest difference of log-probs to the model in transformers: at the start, after one push and after another."""
    from transformers import AutoModelForCausalLM

    import lightning_rft as rft
    from lightning_rft.sync.transports.transport import announce

    def truth(folder: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logprobs = model(torch.tensor([PROMPT])).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0]

    started: Any = (
        rft.VLLMEngine(dtype="float32", tensor_parallel_size=ranks) if engine == "vllm" else rft.TransformersEngine()
    )
    module = rft.RFTModule(new)
    module.configure_model()
    weights = [(name, tensor.detach()) for name, tensor in module.weights()]
    manifest = announce(weights, "float32")
    started.prepare()
    started.start(old, max_model_len=256, seed=0)
    found = {"between": float((truth(old) - truth(new)).abs().max())}
    found["start"] = float((torch.tensor(started.prompt_logprobs(PROMPT)) - truth(old)).abs().max())
    started.connect(MemoryLink(dict(weights)))
    for push in (1, 2):
        started.load(manifest, push)
        found[f"push {push}"] = float((torch.tensor(started.prompt_logprobs(PROMPT)) - truth(new)).abs().max())
    started.stop()
    return found


def check(kind: str, folder: Path, with_vllm: InProcess | None, ranks: int = 1) -> None:
    old, new = (write(kind, folder / name, seed) for seed, name in enumerate(("old", "new")))
    if with_vllm is None:
        found = gaps("transformers", str(old), str(new), ranks)
    else:
        found = with_vllm(folder, gaps, "vllm", str(old), str(new), ranks)
    assert found.pop("between") > 1e-2, "the weights must differ visibly for this to mean anything"
    assert max(found.values()) < 1e-4, found


@pytest.mark.vllm
@pytest.mark.parametrize("kind", OFTEN)
def test_vllm_computes_what_the_trainer_does(kind: str, tmp_path: Path, with_vllm: InProcess) -> None:
    check(kind, tmp_path, with_vllm)


@pytest.mark.vllm
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OFTEN])
def test_vllm_computes_what_the_trainer_does_with_any_kind(kind: str, tmp_path: Path, with_vllm: InProcess) -> None:
    check(kind, tmp_path, with_vllm)


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["granite"])
def test_tensor_parallel_ranks_pad_the_vocabulary_on_the_last_alone(
    kind: str, tmp_path: Path, with_vllm: InProcess
) -> None:
    check(kind, tmp_path, with_vllm, ranks=2)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gemma2"])
def test_transformers_engine_takes_a_checkpoints_names(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path, None)


def test_all_ends_count(tmp_path: Path) -> None:
    import json

    from lightning_rft.model_folder import Pretrained
    from lightning_rft.testing import tiny_model

    folder = tiny_model(tmp_path / "model")
    assert Pretrained(str(folder)).end_ids() == {1}
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert Pretrained(str(folder)).end_ids() == {1, 5, 6}
    generation.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert Pretrained(str(folder)).end_ids() == {1}, "the tokenizer's"
