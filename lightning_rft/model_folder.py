"""Checks of a model before it is loaded: whether its folder is complete, and how long its context is."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_rft.errors import ConfigurationError

__all__ = ["check_model", "context_length"]

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


def context_length(model: str) -> int | None:
    """Maximum tokens of the context according to the model's config; ``None`` if that is silent or not on this disk."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    length = config.get("max_position_embeddings", config.get("n_positions"))
    return int(length) if length else None
