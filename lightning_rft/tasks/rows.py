"""Rows of lists, tables and files, each read when it is asked for."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    read, count = _reader(source, named or {})
    if read is None:
        raise ConfigurationError(
            f"{setting} is a {type(source).__name__}: give a list of tasks, even for a single one"
            + (", or columns that are equally long" if isinstance(source, Mapping) else "")
        )
    return Rows(count, read, partial("{}[{}]".format, setting))


def _reader(source: Any, named: Mapping[str, str]) -> tuple[Callable[[int, int], list[Any]] | None, int]:
    """What reads the rows of a source, which goes to another process with it, and their number."""
    if hasattr(source, "to_pylist") and hasattr(source, "slice"):
        return partial(_of_arrow, source), len(source)
    if hasattr(source, "to_dicts"):
        return partial(_of_polars, source), len(source)
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        return partial(_of_pandas, source), len(source)
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):
        return partial(_of_datasets, source), len(source)
    if isinstance(source, Mapping):
        columns = _columns(source, named)
        if columns:
            return partial(_of_columns, columns), len(next(iter(columns.values())))
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes | Task):
        rows = source if isinstance(source, Sequence) else list(source)
        return partial(_of_list, rows), len(rows)
    return None, 0


def _of_arrow(table: Any, start: int, stop: int) -> list[Any]:
    return list(map(tidied, table.slice(start, stop - start).to_pylist()))


def _of_polars(table: Any, start: int, stop: int) -> list[Any]:
    return list(map(tidied, table[start:stop].to_dicts()))


def _of_pandas(table: Any, start: int, stop: int) -> list[Any]:
    return list(map(tidied, table.iloc[start:stop].to_dict("records")))


def _of_datasets(table: Any, start: int, stop: int) -> list[Any]:
    return list(map(tidied, _across(table[start:stop])))


def _of_columns(columns: Mapping[str, Sequence[Any]], start: int, stop: int) -> list[Any]:
    return _across({name: column[start:stop] for name, column in columns.items()})


def _of_list(rows: Sequence[Any], start: int, stop: int) -> list[Any]:
    return list(rows[start:stop])


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

    return Rows(len(begins), partial(_of_lines, path, begins), partial(_line, path, begins))


def _of_lines(path: str | Path, begins: Sequence[int], start: int, stop: int) -> list[Any]:
    with open(path, "rb") as file:
        file.seek(begins[start] if start < len(begins) else 0)
        lines = (line for line in file if line.strip())
        return [_parsed(next(lines, b""), _line(path, begins, i)) for i in range(start, min(stop, len(begins)))]


def _line(path: str | Path, begins: Sequence[int], index: int) -> _Line:
    return _Line(path, begins[index])


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
