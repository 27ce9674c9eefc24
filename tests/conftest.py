"""Fixtures that all tests may use. Nothing here applies by itself but the two environment variables."""

from __future__ import annotations

import os

# Before anything imports transformers or tokenizers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lightning_rft.explorer.engines.engine import TensorInfo
from lightning_rft.testing import tiny_model
from tests.processes import Script, Zygote

if TYPE_CHECKING:
    import torch


class MemoryLink:
    """A weight transport within one process: ``push`` says what the next ``receive`` will yield."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.opened: list[int] = []
        self.closed = 0

    def push(self, tensors: Mapping[str, torch.Tensor]) -> list[TensorInfo]:
        self.tensors = dict(tensors)
        return [
            TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]

    def open(self, member: int) -> MemoryLink:
        self.opened.append(member)
        return self

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random llama with tied embeddings and a character tokenizer. Read only."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, much slower when other work wants the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Runs scripts in processes of their own, without vLLM."""
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def start(zygote: Zygote, tmp_path: Path, tiny_model_path: Path) -> Iterator[Callable[[str], Script]]:
    """Starts a script; at the test's end it must have ended, and everything it started too."""
    scripts: list[Script] = []

    def start(source: str) -> Script:
        scripts.append(zygote.start(source, tmp_path, tiny_model_path))
        return scripts[-1]

    yield start
    try:
        for script in scripts:
            script.wait()
            script.gone()
    finally:
        for script in scripts:
            script.kill()


@pytest.fixture
def start_ranks(zygote: Zygote, tmp_path: Path, tiny_model_path: Path) -> Iterator[Callable[[str], list[Script]]]:
    """Starts a script once for each of two ranks; at the test's end all must have ended within ten seconds."""
    scripts: list[Script] = []

    def start_ranks(source: str) -> list[Script]:
        scripts.extend(zygote.start_ranks(source, tmp_path, tiny_model_path))
        return scripts

    yield start_ranks
    try:
        for script in scripts:
            script.wait(10)
            script.gone()
    finally:
        for script in scripts:
            script.kill()


@pytest.fixture
def memory_link() -> MemoryLink:
    return MemoryLink()
