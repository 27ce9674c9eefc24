"""A Jupyter kernel for tests: cells are run as a front end runs them, and can be interrupted as by its stop button."""

from __future__ import annotations

import os
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.processes import MARK, MODEL, alive, until

#: Run by IPython before the first cell: explorers that compute nothing in the place of vLLM.
LIGHT = """
import lightning_rft
from tests.processes import LightEngine
lightning_rft.VLLMEngine = lambda **_: LightEngine(mean_tokens=4)
"""


def variables(folder: Path, model: Path, mark: str, startup: str = "") -> dict[str, str]:
    """The environment of a kernel that imports from where the tests do, and writes to a folder alone."""
    scripts = folder / "ipython" / "profile_default" / "startup"
    scripts.mkdir(parents=True)
    (scripts / "stand_in.py").write_text(startup)
    return os.environ | {
        MARK: mark,
        MODEL: str(model),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_DATA_DIR": str(folder / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path),
    }


@dataclass
class Outcome:
    """What came of a cell: the name of the exception that ended it, if one did, and all text that it showed."""

    error: str = ""
    text: str = ""
    pictures: list[str] = field(default_factory=list)


class Kernel:
    """A kernel in a folder; its processes and those that it starts carry a mark."""

    def __init__(self, folder: Path, model: Path) -> None:
        client = pytest.importorskip("jupyter_client")
        pytest.importorskip("ipykernel")
        self.folder = folder
        self._mark = uuid.uuid4().hex
        self._manager, self._client = client.manager.start_new_kernel(
            startup_timeout=120, kernel_name="python3", cwd=str(folder), env=variables(folder, model, self._mark)
        )

    def begin(self, cell: str) -> str:
        """Starts a cell and returns its id."""
        message: str = self._client.execute(cell)
        return message

    def wait_for(self, name: str) -> None:
        """Returns when a cell or an explorer has called ``touch(name)``."""
        until(lambda: (self.folder / name).exists(), name, timeout_s=200)  # importing vLLM included

    def interrupt(self) -> None:
        self._manager.interrupt_kernel()

    def end(self, cell: str, timeout_s: float = 60.0) -> Outcome:
        """Waits for the end of a cell."""
        outcome = Outcome()
        while True:
            message = self._client.get_iopub_msg(timeout=timeout_s)
            if message["parent_header"].get("msg_id") != cell:
                continue
            content: dict[str, Any] = message["content"]
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                return outcome
            outcome.text += content.get("text", "") + content.get("data", {}).get("text/plain", "")
            outcome.text += "\n".join(content.get("traceback", []))
            outcome.error = content.get("ename", outcome.error)

    def run(self, cell: str) -> Outcome:
        return self.end(self.begin(cell))

    def others(self) -> dict[int, str]:
        """Processes that the kernel has started."""
        return {pid: command for pid, command in alive(self._mark).items() if "ipykernel_launcher" not in command}

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
