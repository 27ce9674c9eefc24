"""Runs a function in a process of its own: a second vLLM engine in one process does not start."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import cloudpickle

T = TypeVar("T")

_CHILD = """
import pickle, sys
function, arguments = pickle.load(open(sys.argv[1], "rb"))
result = function(*arguments)
pickle.dump(result, open(sys.argv[2], "wb"))
"""


def in_process(
    folder: Path, function: Callable[..., T], *arguments: object, environment: Mapping[str, str] | None = None
) -> T:
    """What ``function(*arguments)`` returns in a new process; its output is in the error if it fails."""
    call, answer = folder / "call.pkl", folder / "answer.pkl"
    cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    call.write_bytes(cloudpickle.dumps((function, arguments)))
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(call), str(answer)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    result: T = pickle.loads(answer.read_bytes())
    return result
