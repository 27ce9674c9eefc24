"""Checkpoints, in memory and on a disk: what is read is what was written, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import lightning_rft as rft
from lightning_rft.errors import TransportError
from lightning_rft.sync.transports import checkpoint, stored
from lightning_rft.sync.transports.checkpoint import CheckpointLink
from lightning_rft.sync.transports.stored import InMemory, OnDisk, Stored
from lightning_rft.sync.transports.transport import Named, Weights

Store = Callable[[Weights], Stored]

METADATA = {"run": "this", "version": "3"}
in_memory = pytest.mark.skipif(not InMemory.supported, reason="this system has no files without a name")


@pytest.fixture(params=[pytest.param("memory", marks=in_memory), "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return lambda weights: InMemory(weights, METADATA)
    return lambda weights: OnDisk(tmp_path / "version-3", weights, METADATA)


def weights(of: dict[str, torch.Tensor], dtype: str = "bfloat16") -> Weights:
    return Weights.of(list(of.items()), dtype)


def policy() -> dict[str, torch.Tensor]:
    embedding = torch.arange(35.0).reshape(7, 5)
    return {
        "embedding": embedding,
        "steps": torch.arange(3),
        "norm": torch.tensor(0.5),
        "none": torch.empty(0, 4),
        "layer": torch.rand(9, 6, generator=torch.Generator().manual_seed(0)).t(),
        "mask": torch.tensor([True, False, True]),
        "head": embedding,
    }


def read(from_: Stored, of: Weights) -> dict[str, torch.Tensor]:
    return dict(CheckpointLink(from_.path, "this", 3).open(0).receive(of.manifest))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_read_is_what_was_written(dtype: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_PIECE", 16)  # so that a tensor is cast in several
    pushed = weights(policy(), dtype)
    written = store(pushed)
    found = read(written, pushed)
    for name, tensor in policy().items():
        expected = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert torch.equal(found[name], expected), name
    others = load_file(written.path)  # as anyone else reads it
    assert set(others) == set(policy()) - {"head"}
    assert all(torch.equal(tensor, found[name]) for name, tensor in others.items())
    written.remove()
    written.remove()
    assert not os.path.exists(written.path)
    assert torch.equal(found["steps"], torch.arange(3))  # who reads it reads on


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]),
            st.lists(st.integers(0, 5), max_size=3),
        )
    ),
    st.sampled_from(["bfloat16", "float32"]),
)
def test_tensors_of_any_shape_and_dtype(kinds: list[tuple[str, list[int]]], dtype: str) -> None:
    of = {f"{i}": (torch.rand(shape) * 100).to(getattr(torch, kind)) for i, (kind, shape) in enumerate(kinds)}
    pushed = weights(of, dtype)
    written = InMemory(pushed, METADATA)
    found = read(written, pushed)
    for name, tensor in of.items():
        assert torch.equal(found[name], tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor)
    written.remove()


def test_writes_that_take_less_than_they_are_given_go_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: whole(file, data[:7], position))
    pushed = weights(policy())
    written = store(pushed)
    assert torch.equal(read(written, pushed)["layer"], policy()["layer"].to(torch.bfloat16))
    written.remove()


def test_what_is_torn_or_of_another_version_is_not_loaded(store: Store) -> None:
    pushed = weights(policy())
    written = store(pushed)
    for run, version in (("another", 3), ("this", 4)):
        with pytest.raises(TransportError, match=rf"is version 3 of run this, not version {version} of run {run}"):
            next(CheckpointLink(written.path, run, version).receive(pushed.manifest))
    os.truncate(written.path, 300)
    with pytest.raises(TransportError, match="torn or missing"):
        read(written, pushed)
    written.remove()
    with pytest.raises(TransportError, match="torn or missing"):
        read(written, pushed)


def test_one_that_cannot_be_finished_leaves_nothing(store: Store, tmp_path: Path) -> None:
    def tensors() -> Iterator[Named]:
        yield "embedding", torch.ones(7, 5)
        raise LookupError("in the middle")

    whole = weights(policy())
    before = set(os.listdir("/proc/self/fd")) if InMemory.supported else set()
    with pytest.raises(LookupError):
        store(Weights(whole.manifest, whole.device, tensors))
    with pytest.raises(TransportError, match="embedding was announced, but steps was to be sent"):
        store(Weights(whole.manifest, whole.device, lambda: iter([("steps", torch.ones(3))] * 6)))
    assert list(tmp_path.iterdir()) == []
    assert not InMemory.supported or set(os.listdir("/proc/self/fd")) == before


# The transport


class Explorers:
    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.address = address
        self.links: list[CheckpointLink] = []

    def members(self) -> dict[int, int]:
        return {0: 1}

    def connect(self, explorer: int, link: CheckpointLink) -> None:
        self.links.append(link)

    def load(self, *_: Any) -> None:
        dict(self.links[-1].receive(weights(policy()).manifest))

    def wait_loaded(self, *_: Any) -> list[int]:
        return []

    def end(self, explorers: Sequence[int], blame: str) -> None:
        assert not explorers


def pushed(transport: rft.CheckpointTransport, folder: Path, versions: int = 3) -> list[str]:
    """Paths of the versions that were pushed."""
    explorers = Explorers(folder)
    for version in range(versions):
        transport.push(weights(policy()), version, explorers)  # type: ignore[arg-type]
    return [link.path for link in explorers.links]


@in_memory
def test_in_memory_there_is_the_newest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 4 * stored.data_bytes(weights(policy()).manifest))
    before = set(os.listdir("/proc/self/fd"))
    transport = rft.CheckpointTransport()
    *_, newest = pushed(transport, tmp_path)
    assert newest.startswith(f"/proc/{os.getpid()}/fd/")
    assert len(set(os.listdir("/proc/self/fd")) - before) == 1
    transport.close()
    transport.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_goes_to_the_runs_folder_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = stored.data_bytes(weights(policy()).manifest)
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 4 * size - 1)
    transport = rft.CheckpointTransport()
    with caplog.at_level("INFO"):
        paths = pushed(transport, tmp_path)
    assert all(path.startswith(str(tmp_path / "weights")) for path in paths)
    assert [os.path.exists(path) for path in paths] == [False, True, True]
    (word,) = [message for message in caplog.messages if "not into memory" in message]
    assert str(tmp_path / "weights") in word
    transport.close()
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_full_disk_or_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for transport in (rft.CheckpointTransport(), rft.CheckpointTransport(tmp_path)):
        with pytest.raises(TransportError, match=r"No space left .*: free some space, or set .*dirpath=...\)"):
            pushed(transport, tmp_path)


@in_memory
def test_a_run_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    source = (
        "import sys, time; from pathlib import Path\n"
        "from tests.sync.test_checkpoint import pushed, rft\n"
        "print(pushed(rft.CheckpointTransport(), Path(sys.argv[1]))[-1], flush=True); time.sleep(600)\n"
    )
    shared = set(os.listdir("/dev/shm"))
    with subprocess.Popen([sys.executable, "-c", source, str(tmp_path)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        path = run.stdout.readline().strip()
        assert load_file(path).keys() == set(policy()) - {"head"}  # another process reads it
        run.send_signal(signal.SIGKILL)
    assert not os.path.exists(path)
    assert list(tmp_path.iterdir()) == []
    assert set(os.listdir("/dev/shm")) <= shared
