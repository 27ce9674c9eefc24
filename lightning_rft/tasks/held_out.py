"""Held-out tasks: one set, or several by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.sources import Tasks
from lightning_rft.tasks.task import FIELDS
from lightning_rft.tasks.task_set import TaskSet, read_tasks

__all__ = ["HeldOut", "read_sets"]

# The mapping first: jsonargparse takes the first type that fits.
HeldOut = Mapping[str, TaskSet | Tasks] | TaskSet | Tasks

_NAME = re.compile(r"\w[\w.-]*")
_METRIC = re.compile(r"reward|version|completion_length|truncated_share|(pass|avg|maj)(_at_|@)\d+")


def read_sets(val_tasks: HeldOut | None) -> dict[str, list[Task]]:
    """Reads sets of tasks by name; one alone has the empty name.

    A mapping is one of sets, unless it has a column of prompts.

    Raises :class:`ConfigurationError` as :func:`read_tasks`, and for the name of a set that loggers would confuse with
    that of a metric.
    """
    if val_tasks is None:
        return {}
    if not isinstance(val_tasks, Mapping) or not val_tasks or not val_tasks.keys().isdisjoint(FIELDS["prompt"]):
        return {"": read_tasks(val_tasks, "val_tasks")}
    for name in val_tasks:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"val_tasks has a set named {name!r}: name it with letters, digits, '_', '-' and '.', since it becomes "
                "part of a metric's name"
            )
        if _METRIC.fullmatch(name):
            raise ConfigurationError(
                f"val_tasks has a set named {name!r}, as is a metric: give it another name, since val/{name} cannot be "
                "both a metric and a folder of metrics"
            )
    return {name: read_tasks(tasks, f"val_tasks[{name!r}]") for name, tasks in val_tasks.items()}
