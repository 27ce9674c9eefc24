"""Model folders: whether one is whole, how long its context is, and what its checkpoint calls each weight."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rft.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = ["check_model", "check_policy", "checkpoint_weights", "context_length", "end_ids", "right_attention"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def check_model(model: str) -> None:
    """Raises :class:`ConfigurationError` if a model's folder is missing, or lacks a config or a tokenizer."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise ConfigurationError(
                f"model={model!r} is no folder: give an existing folder or a hub name 'owner/name'"
            )
        return  # perhaps a hub name; loading the tokenizer, before any process starts, checks it
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"model={model!r} has no config.json: give a folder that save_pretrained() wrote")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigurationError(
            f"model={model!r} has no tokenizer: save it there too, with tokenizer.save_pretrained({model!r})"
        )


def check_policy(policy: Any) -> None:
    """Raises :class:`ConfigurationError` if there is a policy whose weights have other names than its folder's."""
    from transformers import PreTrainedModel

    if policy is not None and not isinstance(policy, PreTrainedModel):
        raise ConfigurationError(
            f"policy is a {type(policy).__name__}, whose weights have other names than the model's: leave the model of "
            "transformers as it is, without a wrapper"
        )


def context_length(model: str) -> int | None:
    """Maximum tokens of the context according to the config of a folder or hub name; ``None`` if that is silent."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(model)
    except OSError:  # no such folder, and no hub
        return None
    config = config.get("text_config", config)
    length = config.get("max_position_embeddings", config.get("n_positions"))
    return int(length) if length else None


def checkpoint_weights(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entries of a model's ``state_dict``, whole, under the names and in the shapes of a checkpoint.

    transformers holds some models in memory otherwise than checkpoints do: the experts of a layer, for example, as one
    tensor. vLLM knows a model by its checkpoint.
    """
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, weights)
    return converted


def end_ids(model: str) -> frozenset[int]:
    """Token ids that end an answer: those of the generation config, of the model's config and of the tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(model)
    named = [config.get_text_config().eos_token_id]
    with contextlib.suppress(OSError):  # there need not be one
        named.append(GenerationConfig.from_pretrained(model).eos_token_id)
    with contextlib.suppress(OSError, ValueError):  # nor a tokenizer, for an engine alone
        named.append(AutoTokenizer.from_pretrained(model).eos_token_id)
    ids: set[int] = set()
    for one in named:
        ids.update(one if isinstance(one, list) else [] if one is None else [one])
    return frozenset(ids)


def right_attention(config: Any) -> str | None:
    """The attention of transformers that computes what a model is; ``None`` where transformers' own choice does."""
    # sdpa has no soft cap, and leaves Gemma-2's out without a word
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
