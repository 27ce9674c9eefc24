"""Rows of lists, tables and files, each read when it is asked for."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.task import FIELDS, NotATask

__all__ = ["Rows", "lines_of", "rows_of", "tidied"]


class Rows:
    """A number of rows: ``read(start, stop)`` returns some of them, and errors call one ``where(index)``."""

    def __init__(self, count: int, read: Callable[[int, int], list[Any]], where: Callable[[int], object]) -> None:
        self.count = count
        self.read = read
        self.where = where


def rows_of(source: Any, setting: str, named: Mapping[str, str] | None = None) -> Rows:
    """The rows of a list, of a mapping of columns, or of a table of pandas, polars, Arrow or ``datasets``.

    ``named`` are columns by field. Raises :class:`ConfigurationError` for anything else.
    """

    def rows(read: Callable[[int, int], Iterable[Any]], count: int) -> Rows:
        return Rows(count, lambda start, stop: list(read(start, stop)), lambda index: f"{setting}[{index}]")

    def tidy(table: Iterable[Any]) -> list[Any]:
        return [tidied(row) for row in table]

    if hasattr(source, "to_pylist") and hasattr(source, "slice"):  # arrow
        return rows(lambda start, stop: tidy(source.slice(start, stop - start).to_pylist()), len(source))
    if hasattr(source, "to_dicts"):  # polars
        return rows(lambda start, stop: tidy(source[start:stop].to_dicts()), len(source))
    if hasattr(source, "iloc") and hasattr(source, "columns"):  # pandas
        return rows(lambda start, stop: tidy(source.iloc[start:stop].to_dict("records")), len(source))
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):  # datasets
        return rows(lambda start, stop: tidy(_across(source[start:stop])), len(source))
    if isinstance(source, Mapping):
        columns = _columns(source, named or {})
        if columns:
            count = len(next(iter(columns.values())))
            return rows(lambda start, stop: _across({k: column[start:stop] for k, column in columns.items()}), count)
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes | Task):
        if not isinstance(source, Sequence):
            source = list(source)
        return rows(lambda start, stop: source[start:stop], len(source))
    raise ConfigurationError(
        f"{setting} is a {type(source).__name__}: give a list of tasks, even for a single one"
        + (", or columns that are equally long" if isinstance(source, Mapping) else "")
    )


def lines_of(path: str | Path) -> Rows:
    """The lines of a JSONL file that are not blank; only where each begins is kept in memory.

    A line that is not JSON is a :class:`NotATask`. Raises ConfigurationError if the file cannot be read or is empty.
    """
    begins, offset = array("Q"), 0
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    begins.append(offset)
                offset += len(line)
    except OSError as error:
        raise ConfigurationError(f"tasks cannot be read from {path} ({error}): give a JSONL file in UTF-8") from error
    if not begins:
        raise ConfigurationError(f"{path} has no tasks: give a file with at least one")

    def where(index: int) -> object:
        return _Line(path, begins[index])

    def read(start: int, stop: int) -> list[Any]:
        with open(path, "rb") as file:
            file.seek(begins[start] if start < len(begins) else 0)
            lines = (line for line in file if line.strip())
            return [_parsed(next(lines, b""), where(index)) for index in range(start, min(stop, len(begins)))]

    return Rows(len(begins), read, where)


@dataclass(frozen=True)
class _Line:
    """The place of a line, whose number is counted only for an error."""

    path: str | Path
    offset: int

    @override
    def __str__(self) -> str:
        with open(self.path, "rb") as file:
            before = file.read(self.offset)
        return f"{self.path}, line {before.count(bytes([10])) + 1}"


def _parsed(line: bytes, where: object) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return NotATask(f"{where}: tasks cannot be read from it ({error}): give a JSONL file in UTF-8")
    except ValueError as error:
        return NotATask(f"{where}: not JSON ({error}); write one JSON object per line")


def _columns(source: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Sequence[Any]] | None:
    """Columns of equal length; None if a mapping is something else, such as a single task."""
    columns = {
        name: column if isinstance(column, Sequence) else list(column)
        for name, column in source.items()
        if isinstance(column, Iterable) and not isinstance(column, str | bytes)
    }
    names = [named["prompt"].split(".")[0]] if "prompt" in named else FIELDS["prompt"]
    prompts = next((columns[name] for name in names if name in columns), None)
    if prompts is None or len(columns) < len(source) or len({len(column) for column in columns.values()}) > 1:
        return None
    messages = any(isinstance(message, Mapping) for message in prompts)  # of one chat
    return None if messages else columns


def _across(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def tidied(value: Any) -> Any:
    """A value of a table as plain Python has it, without the keys that Arrow fills where rows have different ones."""
    if isinstance(value, Mapping):
        parts = {key: tidied(part) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not None}
    if hasattr(value, "tolist"):  # numpy, or a tensor
        return tidied(value.tolist())
    if isinstance(value, list | tuple):
        return [tidied(part) for part in value]
    missing = (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")
    return None if missing else value
