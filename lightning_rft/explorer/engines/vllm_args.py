"""Arguments of vLLM that an engine refuses, and the setting of PyTorch's allocator that its sleep does not go with."""

from __future__ import annotations

import os

from lightning_rft.errors import ConfigurationError

__all__ = ["REFUSED", "check_allocator"]

_STAGES = "set tensor_parallel_size, since what pipeline stages hold in flight would outlive a weight push"
_MACHINES = "leave it out, since an engine is one process on one machine, with tensor_parallel_size GPUs of it"
_EXACT = "leave it out: the version and log-prob of every token would no longer be exact"
_DRAFT = "leave it out: pushes bring weights to the model alone, and what drafts for it would stay as it was"
#: What is set elsewhere, or that no value makes right, and what to do instead.
REFUSED = {
    "seed": "set Sampling(seed=...)",
    **dict.fromkeys(("revision", "code_revision", "tokenizer_revision"), "set RFTModule(revision=...)"),
    "trust_remote_code": "set RFTModule(trust_remote_code=...)",
    "hf_token": "set HF_TOKEN in the environment, since settings are saved with a run",
    "pipeline_parallel_size": _STAGES,
    "prefill_context_parallel_size": "set tensor_parallel_size",
    **dict.fromkeys(("distributed_executor_backend", "nnodes", "node_rank"), _MACHINES),
    **dict.fromkeys(("max_num_active_seqs", "max_num_queued_reqs", "max_num_queued_tokens"), "set max_num_seqs"),
    **dict.fromkeys(("scheduling_policy", "scheduler_cls"), "leave it out: a push is checked by a request of priority"),
    **dict.fromkeys(("speculative_config", "spec_method", "spec_model", "spec_tokens"), _DRAFT),
    "enable_lora": "leave it out: whole weights are pushed, to layers without adapters",
    **dict.fromkeys(("async_scheduling", "stream_interval", "logprobs_mode", "max_logprobs"), _EXACT),
    "skip_tokenizer_init": "leave it out: structured outputs need the tokenizer",
    **dict.fromkeys(("logits_processors", "watermark_config", "kv_transfer_config", "kv_offloading_size"), _EXACT),
    "weight_transfer_config": "leave it out: the sync strategy's transport says how weights travel",
    "enable_sleep_mode": "set ExplorerPool(placement='shared')",
}

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch takes the first that is set


def check_allocator() -> None:
    """Raises ConfigurationError if PyTorch is told to take memory in segments that vLLM's sleep cannot give back."""
    for name in _ALLOCATOR:
        settings = os.environ.get(name, "").replace(" ", "").lower().split(",")
        if {"expandable_segments:true", "expandable_segments:1"} & set(settings):
            raise ConfigurationError(
                f"{name}={os.environ[name]} does not go with explorers that share the trainer's GPUs, since vLLM "
                "cannot give such memory back while the trainer trains: take expandable_segments out, or give "
                "explorers GPUs of their own"
            )
