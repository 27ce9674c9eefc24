"""Fixtures that all tests may use. Three environment variables, the tests' order and a spared search apply to all."""

from __future__ import annotations

import os

# Before anything imports torch, transformers or tokenizers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # two would keep the core of the tests beside these busy, with waiting

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_rft.testing import tiny_model
from tests.explorer.in_process import InProcess, in_process
from tests.explorer.links import MemoryLink
from tests.machines import two_machines
from tests.processes import Script, Zygote


@pytest.hookimpl(trylast=True)  # of what -m and -k have left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs vLLM where there is none, and hands files out to workers with those first that take longest.

    Otherwise one worker would have nothing to do while the other is at the last of them.
    """
    if find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip("needs vLLM"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Counter(item.path for item in items)
        runs = Counter(item.path for item in items if _runs(item))
        slow = {item.path for item in items if item.get_closest_marker("chaos") or item.get_closest_marker("vllm")}
        items.sort(key=lambda item: (item.path not in slow, -runs[item.path], -tests[item.path]))  # keeps files whole


def _runs(item: pytest.Item) -> bool:
    """Whether a test starts processes or loads models, as far as can be seen: it takes seconds, not milliseconds."""
    wants = {"tiny_model_path", "zygote"}.intersection(getattr(item, "fixturenames", ()))
    return bool(wants) or "subprocess" in vars(getattr(item, "module", item))


def pytest_collection_finish() -> None:
    """Spares every full search for garbage what was imported until now, which stays."""
    gc.freeze()


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


@pytest.fixture
def no_seed_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in whose process the command line seeds everything."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "1")  # so that it is removed again once seed_everything has set it
        del os.environ[name]


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Runs scripts in processes of their own."""
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="session")
def with_vllm() -> Iterator[InProcess]:
    """Calls functions in processes of their own, with vLLM."""
    with in_process() as call:
        yield call


@pytest.fixture
def start(zygote: Zygote, tmp_path: Path, tiny_model_path: Path) -> Iterator[Callable[..., Script]]:
    """Starts a script; at the test's end it must have ended, and everything it started too."""
    scripts: list[Script] = []

    def start(source: str, *, vllm: bool = False) -> Script:
        scripts.append(zygote.start(source, tmp_path, tiny_model_path, vllm=vllm))
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


#: Two machines with a line between them, for tests of what crosses a network.
machines = pytest.fixture(two_machines)


@pytest.fixture
def memory_link() -> MemoryLink:
    return MemoryLink()
