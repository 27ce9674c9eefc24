"""Which files of the package a thing passes on its way: a profiler that looks at what functions are handed."""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import lightning_rft as rft
from lightning_rft.experience import TensorInfo
from lightning_rft.explorer.engines.requests import Completion
from tests.processes import LightEngine

PACKAGE = str(Path(rft.__file__).parent) + os.sep
_PLAIN = (str, bytes, int, float, type, torch.Tensor, type(None))


def holds(value: Any, kinds: frozenset[str], depth: int = 4) -> bool:
    """Whether a value is of one of our classes, or has one inside: a first item, or a field of a dataclass."""
    if type(value).__name__ in kinds and type(value).__module__.startswith(rft.__name__):  # asyncio has tasks, too
        return True
    if depth == 0 or isinstance(value, _PLAIN):
        return False
    if isinstance(value, dict):
        items: Any = [*list(value.keys())[:3], *list(value.values())[:3]]
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)[:3]
    else:
        items = [getattr(value, name, None) for name in getattr(value, "__dataclass_fields__", ())]
    return any(holds(item, kinds, depth - 1) for item in items)


def is_weight(value: Any) -> bool:
    """Whether a value is a named tensor, the announcement of one, or a sequence of these."""
    if isinstance(value, TensorInfo):
        return True
    if isinstance(value, (list, tuple)) and value:
        return (len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], torch.Tensor)) or is_weight(
            value[0]
        )
    return isinstance(getattr(value, "manifest", None), (list, tuple)) and is_weight(value.manifest)


TRIPS: dict[str, Callable[[Any], bool]] = {
    "task": partial(holds, kinds=frozenset({"Task", "Request"})),
    "group": partial(holds, kinds=frozenset({"Completion", "Turn", "Experience", "Group", "BatchPart", "Packed"})),
    "weight": is_weight,
}


class Tracer:
    """Notes, in order, the files whose functions are called with what makes a trip, or return it."""

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {trip: [] for trip in TRIPS}

    def start(self) -> None:
        """Traces this thread and those that it starts, until it is stopped."""
        threading.setprofile(self._look)
        sys.setprofile(self._look)

    def stop(self) -> None:
        """Ends tracing."""
        threading.setprofile(None)
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE):
            return
        file = code.co_filename.removeprefix(PACKAGE)
        values = [argument]
        if event == "call":
            several = bool(code.co_flags & inspect.CO_VARARGS)
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + several]
            values = [frame.f_locals.get(name) for name in names if name != "self"]
        for trip, found in self.files.items():
            if file not in found and any(map(TRIPS[trip], values)):
                found.append(file)


class TracedEngine(LightEngine):
    """Traces the explorer's process, from the import of what the engine needs to its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(mean_tokens=4)
        self.path = path

    def prepare(self) -> None:
        super().prepare()
        type(self).tracer = Tracer()  # the engine that starts is another object
        self.tracer.start()

    def step(self) -> list[Completion]:
        finished = super().step()
        self.path.write_text(json.dumps(self.tracer.files))
        return finished
