"""A model small enough for any test."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from lightning_rft.errors import ConfigurationError

__all__ = ["tiny_model"]

_PAD, _EOS, _UNK = "<|pad|>", "<|end|>", "<|unk|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model(
    path: str | Path,
    *,
    seed: int = 0,
    vocab_size: int = 128,
    tie_word_embeddings: bool = True,
    architecture: str = "llama",
) -> Path:
    """Writes a tiny random causal LM (fp32, about 0.1 million weights) and a character tokenizer to a folder.

    transformers and vLLM load it from there without a network. Every id of the vocabulary decodes, all printable
    ASCII text encodes, one token per character, and there is a chat template. The global random state is untouched.

    Args:
        path: Folder to write to; created if missing.
        seed: Seed of the weights.
        vocab_size: Vocabulary of model and tokenizer, at least 102.
        tie_word_embeddings: Whether input and output embeddings are one tensor.
        architecture: ``"llama"``, ``"qwen2"`` or ``"qwen3"``.

    Returns:
        The folder.

    Raises:
        ConfigurationError: The architecture is unknown, or the vocabulary too small for ASCII.

    Example::

        path = tiny_model(tmp_path / "model")
        module = RFTModule(model=str(path), objective=GRPO())
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture not in ("llama", "qwen2", "qwen3"):
        raise ConfigurationError(f"tiny_model(architecture={architecture!r}): choose llama, qwen2 or qwen3.")
    tokenizer = _character_tokenizer(vocab_size)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # vLLM's CPU attention takes only multiples of 32
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        # At this width the usual 0.02 gives nearly uniform outputs, which hide errors.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = Path(path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _character_tokenizer(vocab_size: int) -> Any:
    """A ``PreTrainedTokenizerFast`` with one token per character, and special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = (_PAD, _EOS, _UNK, *_ROLES)
    ascii_text = [char for char in string.printable if char.isprintable()] + ["\n"]
    spare = vocab_size - len(special) - len(ascii_text)
    if spare < 0:
        raise ConfigurationError(
            f"tiny_model(vocab_size={vocab_size}): needs at least {vocab_size - spare}, for ASCII and special tokens."
        )
    # Spelled and split as in byte-level BPE ("Ġ" is a space), since for a qwen2 AutoTokenizer replaces this class by
    # one of its own, which assumes that.
    letters = ["Ġ" if char == " " else "Ċ" if char == "\n" else char for char in ascii_text]
    tokens = [*special, *letters, *(chr(0x4E00 + index) for index in range(spare))]
    # Byte-pair encoding without merges is a character model.
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], unk_token=_UNK)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNK,
        additional_special_tokens=list(_ROLES),
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
