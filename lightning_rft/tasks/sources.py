"""Lists of tasks: from Python, JSONL files and reasoning-gym."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.rows import lines_of, rows_of
from lightning_rft.tasks.task import as_task
from lightning_rft.tasks.task_list import TaskList

__all__ = ["Tasks", "as_tasks", "read_jsonl", "reasoning_gym_tasks"]

# Lists first: jsonargparse takes the first type that fits, and a str fits everything when a config is saved.
Tasks = Iterable[Task | Mapping[str, Any] | str] | str | Path


def as_tasks(tasks: Iterable[Task | Mapping[str, Any] | str], *, setting: str = "tasks") -> list[Task]:
    """Turns what users write as tasks into tasks with unique ids.

    Args:
        tasks: Tasks; plain prompts; or mappings with ``prompt`` (or ``messages``, ``question``, ``problem``),
            ``answer`` (or ``solution``, ``ground_truth``), ``id`` and ``metadata``, whose other keys join the metadata.
            A table, or a mapping of columns, is read row by row. An empty id becomes the position: ``"0"``, ``"1"``.
        setting: The user's name for ``tasks``, for errors.

    Raises:
        ConfigurationError: There are no tasks, one has no usable prompt or a wrong type, or two share an id.

    Example:
        >>> as_tasks([{"question": "2 + 2 =", "answer": 4, "level": "easy"}])
        [Task(prompt='2 + 2 =', answer=4, id='0', metadata={'level': 'easy'})]
    """
    return list(TaskList(rows_of(tasks, setting), setting))


def read_jsonl(path: str | Path) -> list[Task]:
    """Reads tasks from a file with one JSON value per line, each as for :func:`as_tasks`; skips blank lines.

    Ids that the file leaves out stay empty, so that several lists can be joined.

    Raises:
        ConfigurationError: The file cannot be read or is empty, or a line (named by its number) is no task.
    """
    lines = lines_of(path)
    return [as_task(line, lines.where(index)) for index, line in enumerate(lines.read(0, lines.count))]


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
