"""Runs functions in processes of their own that know vLLM: a second engine in one process does not start."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cloudpickle

from lightning_rft.explorer.engines.vllm import VLLMEngine
from tests.processes import Zygote

T = TypeVar("T")

# What starts workers of its own imports this script once more, under another name.
_SCRIPT = """
    import pickle
    if __name__ == "__main__":
        function, arguments = pickle.load(open("call.pkl", "rb"))
        pickle.dump(function(*arguments), open("answer.pkl", "wb"))
"""


class InProcess(Protocol):
    """What :func:`in_process` yields: calls a function, in a folder of its own."""

    def __call__(self, folder: Path, function: Callable[..., T], *arguments: Any) -> T: ...


@contextmanager
def in_process() -> Iterator[InProcess]:
    """Calls functions in forks of a process that has imported vLLM, which takes four times as long as to start it."""
    zygote = Zygote("vllm", environment=VLLMEngine().environment(2))

    def call(folder: Path, function: Callable[..., T], *arguments: Any) -> T:
        cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
        (folder / "call.pkl").write_bytes(cloudpickle.dumps((function, arguments)))
        script = zygote.start(_SCRIPT, folder, folder, vllm=True)
        try:
            assert script.wait(240) == 0, script.stdout[-2000:] + script.stderr[-6000:]
            script.gone()
        finally:
            script.kill()
        result: T = pickle.loads((folder / "answer.pkl").read_bytes())
        return result

    try:
        yield call
    finally:
        zygote.close()
