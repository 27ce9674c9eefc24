"""What tests of whole runs share: scripts as processes, who is still alive, and explorers that start quickly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from lightning_rft.explorer.engines.fake import FakeEngine

HERE = Path(__file__).parent
MARK = "LIGHTNING_RFT_TEST"
MODEL = "LIGHTNING_RFT_TEST_MODEL"

_POLL_S = 0.02
_T = TypeVar("_T")


class LightEngine(FakeEngine):
    """A fake engine whose explorer does not import transformers, and is ready in a second."""

    def environment(self, threads: int) -> dict[str, str]:
        path = os.pathsep.join([str(HERE / "light"), *(folder or os.getcwd() for folder in sys.path)])
        return super().environment(threads) | {"PYTHONPATH": path}

    def prepare(self) -> None:
        super().prepare()
        # how to compute shapes without numbers, which nothing here does: a quarter of what it takes to import torch
        sys.modules.setdefault("torch._meta_registrations", ModuleType("torch._meta_registrations"))


def share_of_letters(completion: str, task: Any) -> float:
    """A reward that differs between the samples of a group."""
    return sum(character.isalpha() for character in completion) / len(completion)


def touch(name: str) -> None:
    """Tells the test that something has happened, by a file in the run's folder."""
    Path(name).touch()


def until(condition: Callable[[], _T], what: str, timeout_s: float = 60.0) -> _T:
    """Waits for an event and returns what it was."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(_POLL_S)
    return found


def alive(mark: str) -> dict[int, str]:
    """Process id and command line of all processes that were started with the mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has just ended, or is another user's
                continue
    return found


class Zygote:
    """Starts scripts in forks of one process that has imported everything; see ``zygote.py``."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        # unbuffered, a line is written in pieces, and the lines of two ranks get into each other
        fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
        variables = os.environ | fixed | dict(environment or {})
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        source: str,
        folder: Path,
        model: Path,
        mark: str = "",
        variables: dict[str, str] | None = None,
        *,
        vllm: bool = False,
    ) -> Script:
        """Starts a script, which finds vLLM installed only if it asks for that."""
        script = folder / "script.py"
        script.write_text(textwrap.dedent(source))
        mark = mark or uuid.uuid4().hex
        environment = {MARK: mark, MODEL: str(model), **(variables or {})}
        pid = self.ask(script=str(script), folder=str(folder), environment=environment, vllm=vllm)
        return Script(self, pid, folder, mark)

    def start_ranks(self, source: str, folder: Path, model: Path, count: int = 2) -> list[Script]:
        """Starts a script once for each rank, as a cluster does, each in a folder of its own."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        mark = uuid.uuid4().hex
        scripts = []
        for rank in range(count):
            place = folder / f"rank-{rank}"
            place.mkdir()
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
            scripts.append(self.start(source, place, model, mark, variables | {"LOCAL_RANK": str(rank)}))
        return scripts

    def close(self) -> None:
        self._process.communicate(timeout=30)


class Script:
    """A script that runs in a process of its own, its output in ``stdout`` and ``stderr`` of its folder."""

    def __init__(self, zygote: Zygote, pid: int, folder: Path, mark: str) -> None:
        self.pid = pid
        self.status: int | None = None
        self._zygote = zygote
        self._folder = folder
        self._mark = mark

    def wait(self, timeout_s: float = 60.0) -> int:
        """Returns its exit status once it has ended; negative is the signal that killed it."""
        until(self._ended, "the end of the script", timeout_s)
        assert self.status is not None
        return self.status

    def wait_for(self, name: str) -> None:
        """Returns when the script or one of its processes has called ``touch(name)``."""
        until(lambda: (self._folder / name).exists() or self._ended(), name)
        assert (self._folder / name).exists(), f"ended before {name}:\n{self.stderr}"

    def signal(self, number: int, *, group: bool = False) -> None:
        if group:
            os.killpg(self.pid, number)  # as a terminal does
        else:
            os.kill(self.pid, number)

    def children(self, module: str) -> list[int]:
        """Process ids of what runs a module of ours in this run."""
        return [pid for pid, command in alive(self._mark).items() if module in command]

    def gone(self) -> None:
        """Waits for the end of every process of the run."""
        until(lambda: not alive(self._mark), f"the end of {alive(self._mark)}", timeout_s=10.0)

    def kill(self) -> None:
        for pid in [*([] if self._ended() else [self.pid]), *alive(self._mark)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()

    def _ended(self) -> bool:
        if self.status is None:
            self.status = self._zygote.ask(poll=self.pid)
        return self.status is not None


def fit(
    module: type | None = None,
    callbacks: tuple[Any, ...] = (),
    strategy: str = "Synchronous",
    engine: Any = None,
    explorer_count: int = 1,
    max_restarts: int = 0,
    transport: Any = None,
    devices: int = 1,
    parallel: Any = "auto",
    trainer_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Trains the tiny model for three steps in the current folder, and returns the trainer. For scripts."""
    import torch

    import lightning_rft as rft
    from tests.trainer_and_data import fake_data, quiet_trainer

    torch.set_num_threads(1)
    defaults: dict[str, Any] = {
        "tasks": ["1 + 1 =", "1 + 2 =", "1 + 3 ="],
        "explorers": rft.ExplorerPool(engine or LightEngine(), explorer_count, max_restarts=max_restarts),
        "tasks_per_step": 1,
        "max_new_tokens": 8,
        "buffer": ":memory:",
        "timeouts": rft.Timeouts(start_s=30.0, progress_s=30.0),
    }
    trainer = quiet_trainer(
        os.getcwd(),
        *callbacks,
        getattr(rft, strategy)(transport=transport),
        **{"max_epochs": 1, "devices": devices, "strategy": parallel, "limit_val_batches": None}
        | (trainer_settings or {}),
    )
    trainer.fit((module or rft.RFTModule)(os.environ[MODEL]), datamodule=fake_data(**defaults | settings))
    return trainer
