"""One task from what users write: a string, a mapping, a row of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.pickling import dumps
from lightning_rft.tasks.prompts import prompt_problem, text_problem

__all__ = ["FIELDS", "NotATask", "as_task", "reach"]

_DEPTH = 20  # of values in values that are looked into

#: Field of a task -> its names in data; the first that has a value counts, and the others are metadata.
FIELDS = {
    "prompt": ("prompt", "messages", "question", "problem"),
    "answer": ("answer", "solution", "ground_truth", "reward_model.ground_truth"),
    "id": ("id",),
    "metadata": ("metadata",),
}


class NotATask(ConfigurationError):
    """A value that cannot be turned into a task."""


def as_task(value: Any, where: object, columns: Mapping[str, str] | None = None) -> Task:
    """Checks one task, which errors call ``where``, and makes its id a string; ``columns`` name fields of a mapping."""
    if isinstance(value, str):
        task = Task(value)
    elif isinstance(value, Mapping):
        task = _from_mapping(value, where, columns or {})
    elif isinstance(value, Task):
        task = value if isinstance(value.id, str) else replace(value, id=str(value.id))
    elif isinstance(value, NotATask):  # a line of a file that could not be parsed
        raise value
    else:
        raise NotATask(f"{where} is a {type(value).__name__}; give a Task, a mapping or a string")
    problem = prompt_problem(task.prompt)
    if problem:
        raise NotATask(f"{where}: {problem}; give text, or chat messages with `role` and `content`")
    problem = text_problem(task.id, "the id")
    if problem:
        raise NotATask(f"{where}: {problem}; give another one, or none")
    _check_travels(task, where)
    return task


def reach(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or inside it where dots lead into mappings; None if there is none."""
    if name in row or "." not in name:
        return row.get(name)
    outer, inner = name.split(".", 1)
    struct = row.get(outer)
    return reach(struct, inner) if isinstance(struct, Mapping) else None


def _from_mapping(row: Mapping[str, Any], where: object, columns: Mapping[str, str]) -> Task:
    rest = dict(row)
    fields: dict[str, Any] = {}
    for field, names in FIELDS.items():
        fields[field] = None
        for name in (columns[field],) if field in columns else names:
            fields[field] = reach(row, name)
            if name in row:
                del rest[name]  # while a mapping that a value is taken out of stays whole
            if fields[field] is not None:
                break
    if fields["prompt"] is None:
        raise NotATask(f"{where}: {_no_prompt(columns)}; give text or chat messages; it has {', '.join(row) or 'none'}")
    metadata = fields["metadata"] or {}
    if not isinstance(metadata, Mapping):
        raise NotATask(f"{where}: metadata is a {type(metadata).__name__}; give a mapping")
    name = "" if fields["id"] is None else str(fields["id"])
    return Task(fields["prompt"], answer=fields["answer"], id=name, metadata={**metadata, **rest})


def _no_prompt(columns: Mapping[str, str]) -> str:
    if "prompt" in columns:
        return f"no `{columns['prompt']}`, which columns={dict(columns)!r} names as the prompt"
    first, *others = FIELDS["prompt"]
    return (
        f"no `{first}` (or {', '.join(f'`{name}`' for name in others)}, or as TaskSet(columns={{'prompt': ...}}) says)"
    )


def _check_travels(task: Task, where: object) -> None:
    for name in ("prompt", "answer", "metadata"):
        value = getattr(task, name)
        if not _is_plain(value):
            try:
                dumps(value)
            except Exception as error:  # pickling runs any object's own code
                raise NotATask(
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
