"""Both halves of a push in processes of their own, which may be on two machines: what joins them are files."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_rft.errors import LinkError
from lightning_rft.experience import TensorInfo
from lightning_rft.sync.transports.collective import CollectiveTransport
from lightning_rft.sync.transports.transport import Weights
from tests.processes import touch, until

TENSORS = 4  # of a MiB each, which is a bucket


class Explorers:
    """One explorer in another process, which reads what it is asked for in files."""

    dtype = "float32"
    nccl = False

    def __init__(self, address: str) -> None:
        self.address = address

    def members(self) -> dict[int, int]:
        return {0: 1}

    def connect(self, explorer: int, link: Any) -> None:
        write("link", link)

    def load(self, explorer: int, manifest: Sequence[TensorInfo], version: int) -> None:
        write("manifest", manifest)

    def raise_failures(self) -> None:
        pass

    def wait_loaded(self, version: int, explorers: Sequence[int], timeout_s: float) -> list[int]:
        try:
            until(lambda: Path("loaded").exists() or Path("broke-off").exists(), "the load", timeout_s)
        except TimeoutError:
            return [0]
        if Path("broke-off").exists():
            raise LinkError("the weight transport broke off")
        return []

    def end(self, explorers: Sequence[int], blame: str) -> None:
        if explorers:
            print("ended", explorers)

    def settle(self, explorers: Sequence[int], timeout_s: float) -> list[int]:
        until(lambda: Path("broke-off").exists(), "the end of the load", 2 * timeout_s)
        return []


def write(name: str, what: object) -> None:
    """Writes a file that is there with all it holds, or not at all."""
    Path(f".{name}").write_bytes(pickle.dumps(what))
    os.rename(f".{name}", name)


def read(name: str) -> Any:
    return pickle.loads(until(lambda: Path(name).exists() and Path(name).read_bytes(), name))


def policy() -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return {f"layer{index}": torch.rand(1 << 18, generator=numbers) for index in range(TENSORS)}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()


def trainer(address: str, timeout_s: float) -> None:
    """Pushes by Gloo, and prints how that ended and when."""
    transport = CollectiveTransport("gloo", timeout_s, bucket_mib=1)
    began = time.monotonic()
    try:
        transport.push(Weights.of(list(policy().items()), "float32"), 0, Explorers(address))  # type: ignore[arg-type]
        print("pushed", digest(policy()))
    except LinkError as error:
        print(type(error).__name__, error)
    print(time.monotonic() - began)
    transport.close()


def explorer() -> None:
    """Receives, and prints what came."""
    receiver = read("link").open(0)
    manifest = read("manifest")
    began = time.monotonic()
    arrived = {}
    try:
        for name, tensor in receiver.receive(manifest):
            arrived[name] = tensor
            touch("arrives")
        print("loaded", digest(arrived))
        touch("loaded")
    except LinkError as error:
        print("LinkError", error)
        touch("broke-off")
    print(time.monotonic() - began)
    receiver.close()
