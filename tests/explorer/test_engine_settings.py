"""What an engine is told wrongly is refused before any process starts, in words that name the setting."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import lightning_rft as rft


@pytest.mark.parametrize("engine", [rft.FakeEngine, rft.TransformersEngine, rft.VLLMEngine])
@pytest.mark.parametrize("value", [0, -3, 2.5])
def test_every_count_is_at_least_one(engine: type[rft.Engine], value: Any) -> None:
    for setting in engine.counts:
        with pytest.raises(rft.ConfigurationError, match=rf"{engine.__name__}\({setting}={value}\)"):
            engine(**{setting: value}).check()


@pytest.mark.parametrize("engine", [rft.TransformersEngine, rft.VLLMEngine])
def test_an_unknown_dtype_is_refused(engine: Any) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"dtype='float8'\): choose one of auto, float32"):
        engine(dtype="float8").check()


REFUSED = {
    "model": r"set VLLMEngine\(model=...\)",
    "dtype": r"set VLLMEngine\(dtype=...\)",
    "tensor_parallel_size": r"set VLLMEngine\(tensor_parallel_size=...\)",
    "max_num_seqs": r"set VLLMEngine\(max_num_seqs=...\)",
    "max_model_len": r"set VLLMEngine\(max_model_len=...\)",
    "seed": r"set Sampling\(seed=...\)",
    "pipeline_parallel_size": "set tensor_parallel_size",
    "data_parallel_size": r"set RFTDataModule\(explorers=...\)",
    "data_parallel_size_local": r"set RFTDataModule\(explorers=...\)",
    **dict.fromkeys(("distributed_executor_backend", "nnodes", "node_rank"), "leave it out, since .* one machine"),
    **dict.fromkeys(("max_num_active_seqs", "max_num_queued_reqs", "max_num_queued_tokens"), "set max_num_seqs"),
    **dict.fromkeys(("scheduling_policy", "scheduler_cls"), "leave it out: .* priority"),
    **dict.fromkeys(("speculative_config", "spec_method", "spec_model", "spec_tokens"), "leave it out: .* drafts"),
    "enable_lora": "leave it out: whole weights are pushed",
    **dict.fromkeys(("async_scheduling", "stream_interval", "logprobs_mode", "skip_tokenizer_init"), "leave it out"),
    "max_logprobs": "leave it out: .* exact",
    **dict.fromkeys(("logits_processors", "watermark_config", "kv_transfer_config"), "leave it out: .* exact"),
    "kv_offloading_size": "leave it out: .* exact",
    "weight_transfer_config": "leave it out: .* transport",
    "enable_sleep_mode": r"set ExplorerPool\(placement='shared'\)",
}


@pytest.mark.parametrize(("name", "advice"), REFUSED.items())
def test_what_vllm_is_not_to_be_told_is_refused(name: str, advice: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=rf"engine_args=...\) cannot hold '{name}': {advice}"):
        rft.VLLMEngine(engine_args={"block_size": 16, name: 1}).check()


@pytest.mark.vllm
def test_vllm_has_no_other_size_that_would_make_an_engine_larger() -> None:
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    names = [field.name for field in dataclasses.fields(arg_utils.EngineArgs)]
    sizes = [name for name in names if name.endswith("parallel_size")]
    sizes.remove("decode_context_parallel_size")  # which uses the tensor-parallel ranks once more
    assert set(REFUSED) <= set(names)
    for name in sizes:
        with pytest.raises(rft.ConfigurationError, match=name):
            rft.VLLMEngine(engine_args={name: 2}).check()
    rft.VLLMEngine(engine_args={"block_size": 16, "generation_config": "auto"}).check()
