"""Task sources: lists, tables, JSONL files and reasoning-gym."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.pickling import dumps
from lightning_rft.tasks.prompts import prompt_problem, text_problem

__all__ = ["Tasks", "as_task", "as_tasks", "read_jsonl", "read_tasks", "reasoning_gym_tasks", "rows"]

_DEPTH = 20  # of values in values that are looked into

# Lists first: jsonargparse takes the first type that fits, and a str fits everything when a config is saved.
Tasks = Iterable[Task | Mapping[str, Any] | str] | str | Path


def as_tasks(tasks: Iterable[Task | Mapping[str, Any] | str], *, setting: str = "tasks") -> list[Task]:
    """Turns what users write as tasks into tasks with unique ids.

    Args:
        tasks: Tasks; plain prompts; or mappings with ``prompt`` (or ``question``), ``answer``, ``id`` and ``metadata``,
            whose other keys join the metadata. A table, or a mapping of columns, is read row by row. An empty id
            becomes the position: ``"0"``, ``"1"``, ...
        setting: The user's name for ``tasks``, for errors.

    Raises:
        ConfigurationError: There are no tasks, one has no usable prompt or a wrong type, or two share an id.

    Example:
        >>> as_tasks([{"question": "2 + 2 =", "answer": 4, "level": "easy"}])
        [Task(prompt='2 + 2 =', answer=4, id='0', metadata={'level': 'easy'})]
    """
    result: list[Task] = []
    position_of: dict[str, int] = {}
    for position, item in enumerate(rows(tasks, setting)):
        task = as_task(item, f"{setting}[{position}]")
        task = task if task.id else replace(task, id=str(position))
        first = position_of.setdefault(task.id, position)
        if first != position:
            raise ConfigurationError(
                f"{setting}[{position}] has the id {task.id!r} of {setting}[{first}]: make ids unique, or empty"
            )
        result.append(task)
    if not result:
        raise ConfigurationError(f"{setting} is empty: give at least one task")
    return result


def read_tasks(tasks: Tasks, setting: str) -> list[Task]:
    """Reads tasks from a file as for :func:`read_jsonl`, or from anything with a length as for :func:`as_tasks`.

    Raises :class:`ConfigurationError` as these do, and for what may have no end.
    """
    if isinstance(tasks, (str, Path)):
        tasks = read_jsonl(tasks)
    if isinstance(tasks, Iterable) and not hasattr(tasks, "__len__"):
        way_out = "set TaskSet(steps_per_epoch=...), or " if setting == "tasks" else ""
        raise ConfigurationError(f"{setting} has no length: {way_out}give a list")
    return as_tasks(tasks, setting=setting)


def rows(tasks: Any, setting: str) -> Iterable[Any]:
    """What users give as tasks, one by one; a table's own iterator would give the names of its columns."""
    if hasattr(tasks, "columns"):
        for export, arguments in {"to_dicts": (), "to_pylist": (), "to_dict": ("records",)}.items():
            if hasattr(tasks, export):  # polars, arrow, pandas
                table: Iterable[Any] = getattr(tasks, export)(*arguments)
                return table
    if isinstance(tasks, Mapping):
        prompts = tasks.get("prompt", tasks.get("question"))
        if isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes):
            columns = {name: list(column) for name, column in tasks.items() if isinstance(column, Iterable)}
            lone = any(isinstance(message, Mapping) for message in prompts)  # the messages of one chat
            if not lone and len(columns) == len(tasks) and len({len(column) for column in columns.values()}) == 1:
                return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    elif isinstance(tasks, Iterable) and not isinstance(tasks, str | bytes | Task):
        return tasks
    raise ConfigurationError(
        f"{setting} is a {type(tasks).__name__}: give a list of tasks, even for a single one"
        + (", or columns that are equally long" if isinstance(tasks, Mapping) else "")
    )


def read_jsonl(path: str | Path) -> list[Task]:
    """Reads tasks from a file with one JSON value per line, each as for :func:`as_tasks`; skips blank lines.

    Ids that the file leaves out stay empty, so that several lists can be joined.

    Raises:
        ConfigurationError: The file cannot be read or is empty, or a line (named by its number) is no task.
    """
    tasks: list[Task] = []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise ConfigurationError(f"{where}: not JSON ({error}); write one JSON object per line") from error
                tasks.append(as_task(value, where))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"tasks cannot be read from {path} ({error}): give a JSONL file in UTF-8") from error
    if not tasks:
        raise ConfigurationError(f"{path} has no tasks: give a file with at least one")
    return tasks


def reasoning_gym_tasks(name: str, size: int, seed: int, *, template: str | None = None, **config: Any) -> list[Task]:
    """Generates tasks with `reasoning-gym <https://github.com/open-thought/reasoning-gym>`_.

    Each has one chat message of the user as prompt, and reasoning-gym's metadata plus the dataset's name.

    Args:
        name: A dataset of reasoning-gym, such as ``"basic_arithmetic"``.
        size: Number of tasks.
        seed: Equal seeds give equal tasks; use another one for validation.
        template: The user's message, with ``{question}`` in place of the question; left out, the question alone.
        config: Further settings of the dataset, such as ``max_digits=2``.

    Raises:
        ConfigurationError: reasoning-gym is not installed, or does not accept ``name`` or ``config``.
    """
    if template is not None and "{question}" not in template:
        raise ConfigurationError(f"template {template!r} has no place for the question: put {{question}} in it")
    try:
        reasoning_gym = importlib.import_module("reasoning_gym")  # slow to import, and optional
    except ImportError as error:
        raise ConfigurationError("reasoning_gym_tasks needs reasoning-gym: pip install reasoning-gym") from error
    names = reasoning_gym.factory.DATASETS
    if name not in names:
        near = difflib.get_close_matches(name, names) or sorted(names)
        raise ConfigurationError(f"name {name!r} is no dataset of reasoning-gym: use one of {', '.join(near)}")
    try:
        entries = list(reasoning_gym.create_dataset(name, size=size, seed=seed, **config))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"reasoning-gym refuses the settings of {name!r} ({error}): correct size={size}, seed={seed}, {config}"
        ) from error
    return [
        Task(
            prompt=[{"role": "user", "content": (template or "{question}").replace("{question}", entry["question"])}],
            answer=entry["answer"],
            metadata={**entry["metadata"], "dataset": name},
        )
        for entry in entries
    ]


def as_task(value: Any, where: str) -> Task:
    """Checks one task, which errors call ``where``, and makes its id a string."""
    if isinstance(value, str):
        task = Task(value)
    elif isinstance(value, Mapping):
        rest = dict(value)
        prompt = rest.pop("prompt", None)
        prompt = rest.pop("question", None) if prompt is None else prompt
        answer, name, metadata = rest.pop("answer", None), rest.pop("id", None), rest.pop("metadata", None) or {}
        if not isinstance(metadata, Mapping):
            raise ConfigurationError(f"{where}: metadata is a {type(metadata).__name__}; give a mapping")
        task = Task(prompt, answer=answer, id="" if name is None else str(name), metadata={**metadata, **rest})
    elif isinstance(value, Task):
        task = value if isinstance(value.id, str) else replace(value, id=str(value.id))
    else:
        raise ConfigurationError(f"{where} is a {type(value).__name__}; give a Task, a mapping or a string")
    problem = prompt_problem(task.prompt)
    if problem:
        raise ConfigurationError(f"{where}: {problem}; give text, or chat messages with `role` and `content`")
    problem = text_problem(task.id, "the id")
    if problem:
        raise ConfigurationError(f"{where}: {problem}; give another one, or none")
    _check_travels(task, where)
    return task


def _check_travels(task: Task, where: str) -> None:
    for name in ("prompt", "answer", "metadata"):
        value = getattr(task, name)
        if not _is_plain(value):
            try:
                dumps(value)
            except Exception as error:  # pickling runs any object's own code
                raise ConfigurationError(
                    f"{where}: its {name} cannot be sent to an explorer process ({error}); give plain values, and have "
                    "the reward or workflow open what must be opened"
                ) from error


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is one of JSON, which can be sent without a try."""
    if value is None or type(value) in (str, int, float, bool):
        return True
    if depth > _DEPTH:
        return False
    if type(value) is dict:
        return all(_is_plain(key, depth + 1) and _is_plain(part, depth + 1) for key, part in value.items())
    return type(value) in (list, tuple) and all(_is_plain(part, depth + 1) for part in value)
