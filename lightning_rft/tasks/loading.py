"""Tasks in files, folders and on the Hugging Face hub."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_rft.errors import ConfigurationError

__all__ = ["library", "load", "one_split"]

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_LINES = (".jsonl", ".json")


def load(source: str | Path, *, split: str, name: str | None, streaming: bool, setting: str) -> Any:
    """A data set of ``datasets`` from a folder, a file or the hub; the path itself of a file of lines.

    Raises:
        ConfigurationError: ``datasets`` is needed and not installed, or cannot load it.
    """
    path = Path(source)
    kind = _BUILDERS.get(path.suffix)
    is_path = isinstance(source, Path) or kind is not None or path.suffix in _LINES
    if (path.is_file() and kind is None) or (is_path and not path.exists()):
        return path
    datasets = library(f"{setting}={str(source)!r}")
    try:
        if path.is_dir() and any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            loaded = one_split(datasets.load_from_disk(str(path)), split, setting)
            return loaded.to_iterable_dataset() if streaming else loaded
        if kind is not None:
            return datasets.load_dataset(kind, data_files=str(path), split=split, streaming=streaming)
        return datasets.load_dataset(str(source), name, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigurationError(
            f"{setting}={str(source)!r}, split={split!r}: datasets cannot load it ({type(error).__name__}: {error}); "
            "give a file, a folder, or a name on the hub, with TaskSet(name=...) where it has several configurations"
        ) from error


def one_split(loaded: Any, split: str, setting: str) -> Any:
    """One of several splits; what is no mapping of splits as it is."""
    splits = loaded if isinstance(loaded, Mapping) else {}
    if not splits or not all(hasattr(part, "column_names") for part in splits.values()):
        return loaded
    if split not in splits:
        raise ConfigurationError(f"{setting} has no split {split!r}: set TaskSet(split=...) to {', '.join(splits)}")
    return splits[split]


def library(what: str) -> Any:
    """The package ``datasets``, which is optional and slow to import."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigurationError(
            f"{what} is loaded with datasets, which is not installed: pip install 'lightning-rft[data]', or give a "
            "JSONL file"
        ) from error
