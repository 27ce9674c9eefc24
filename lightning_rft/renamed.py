"""Old names of settings, which are refused with a message that gives the new name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import ParamSpec

from lightning_rft.errors import ConfigurationError

__all__ = ["MOVED", "MOVED_IN_GRPO", "moved_in_config", "refuses_old_names"]

_P = ParamSpec("_P")

Moves = Mapping[str, tuple[str, str, str]]  # old name: argument, class, field; all since 0.2.0

# of the data module
MOVED: Moves = {
    "temperature": ("sampling", "Sampling", "temperature"),
    "seed": ("sampling", "Sampling", "seed"),
    "shuffle": ("tasks", "TaskSet", "shuffle"),
    "steps_per_epoch": ("tasks", "TaskSet", "steps_per_epoch"),
    "buffer_capacity": ("buffer", "Buffer", "capacity"),
    "group_filter": ("buffer", "Buffer", "group_filter"),
    "selection": ("buffer", "Buffer", "selection"),
    "replay": ("buffer", "Buffer", "replay"),
    "max_model_len": ("engine", "VLLMEngine", "max_model_len"),
    "retries": ("tolerance", "Tolerance", "retries"),
    "min_samples": ("tolerance", "Tolerance", "min_samples"),
    "max_error_rate": ("tolerance", "Tolerance", "max_error_rate"),
    "reward_timeout_s": ("timeouts", "Timeouts", "reward_s"),
    "sample_timeout_s": ("timeouts", "Timeouts", "sample_s"),
    "start_timeout_s": ("timeouts", "Timeouts", "start_s"),
    "rollout_timeout_s": ("timeouts", "Timeouts", "progress_s"),
}
MOVED_IN_GRPO: Moves = {
    "clip_low": ("surrogate", "Clip", "low"),
    "clip_high": ("surrogate", "Clip", "high"),
    "scale_rewards": ("advantage", "GroupRelative", "scale"),
}
_IN_AN_OBJECTIVE = re.compile(r"Option '(\w+)' is not accepted")
_IN_A_PARSERS_MESSAGE = re.compile(r"data\.(\w+)|'(?:\w+\.)?data' does not accept option '(\w+)'")


def refuses_old_names(init: Callable[_P, None], moved: Moves = MOVED) -> Callable[_P, None]:
    """Has an ``__init__`` raise a ConfigurationError for an argument that has moved."""

    @functools.wraps(init)  # signature included, from which the command line's parser is made
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for name in kwargs.keys() & moved.keys():
            argument, kind, field = moved[name]
            source = "tasks, " if kind == "TaskSet" else ""
            stored = ", or buffer=Buffer(path, shuffle=...) where explorers=0" if name == "shuffle" else ""
            raise ConfigurationError(f"{name} moved: set {argument}={kind}({source}{field}=...){stored}")
        init(*args, **kwargs)

    return checked


def moved_in_config(message: str) -> str:
    """The new name of an old key that a parser's message calls unknown; empty if it never existed."""
    for found in _IN_AN_OBJECTIVE.finditer(message):
        if found[1] in MOVED_IN_GRPO:
            argument, kind, field = MOVED_IN_GRPO[found[1]]
            value = f"{{class_path: {kind}, init_args: {{{field}: ...}}}}"
            where = f"model.objective.{argument}.{field}, in a file {argument}: {value}"
            return f"model.objective.{found[1]} moved: set {where}"
    for found in _IN_A_PARSERS_MESSAGE.finditer(message):
        name = found[1] or found[2]
        if name in MOVED:
            argument, kind, field = MOVED[name]
            value = f"{{source: FILE, {field}: ...}}" if kind == "TaskSet" else f"{{{field}: ...}}"
            if argument == "engine":
                value = f"{{class_path: {kind}, init_args: {value}}}"
            stored = ", or buffer: {path: FILE, shuffle: ...} where explorers is 0" if name == "shuffle" else ""
            return f"data.{name} moved: set data.{argument}.{field}, in a file {argument}: {value}{stored}"
    return ""
