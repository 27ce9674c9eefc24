"""What a weight push costs, beside what loading the same weights costs when nothing carries them.

    python -m benchmarks.weight_sync

Pushes, by collective (Gloo) and by checkpoint, in memory and on a ``disk``, go to one and to two explorers with vLLM,
in fits with the synchronous strategy that train nothing: the seconds of the trainer's span, from the policy's
``state_dict`` until the explorers compute with it. Beside them, in the same rounds:

- ``reload``: a process of its own has one of these engines, with the threads of a single explorer, and loads the same
  tensors, every alias included, by the same way, but out of its memory;
- ``memcpy``: ``copy_`` of the same bytes (an alias counted once) between two buffers that were in use before, with the
  trainer's threads.

``collective_extra_memcpys``, ``checkpoint_extra_memcpys`` and ``disk_extra_memcpys`` are (push - reload) / memcpy, to
one explorer: how often the bytes could have been copied meanwhile. All are medians; the first push of every fit, which
makes the group, does not count. Writes ``benchmarks/results/weight_sync.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import lightning_rft as rft
from benchmarks.beside import DEADLINE_S, beside, one_of_two
from benchmarks.overlap import restless, spans
from benchmarks.rollout import Consumes
from lightning_rft.channel import Channel
from lightning_rft.experience import TensorInfo
from lightning_rft.hardware import available_cpus, fast_dtype
from lightning_rft.sync.transports.transport import Named, Transport, announce, nbytes
from lightning_rft.testing import tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

RESULTS = Path(__file__).parent / "results"
MAX_MODEL_LEN, MAX_NUM_SEQS = 128, 4
# each with a folder for what it writes
TRANSPORTS: dict[str, Callable[[Path], Transport]] = {
    "collective": lambda folder: rft.CollectiveTransport("gloo"),
    "checkpoint": lambda folder: rft.CheckpointTransport(),
    "disk": lambda folder: rft.CheckpointTransport(folder / "checkpoints", keep=1),
}


class Held:
    """A link and a receiver that carry nothing: the tensors are there."""

    def __init__(self, weights: Sequence[Named]) -> None:
        self._weights = weights

    def open(self, member: int) -> Held:
        """Is its own receiver."""
        return self

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields them."""
        yield from self._weights

    def close(self) -> None:
        """Does nothing."""


def policy(model: Path, dtype: str) -> list[Named]:
    """What a push of this model's policy brings."""
    from transformers import AutoModelForCausalLM

    return list(AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).state_dict().items())


def reload(channel: Channel) -> None:
    """The process that loads from its own memory, once each time that it is asked."""
    engine = rft.VLLMEngine(max_num_seqs=MAX_NUM_SEQS)
    engine.prepare()
    model = channel.receive()
    engine.start(str(model), max_model_len=MAX_MODEL_LEN, seed=0)
    weights = policy(model, engine.dtype)
    manifest = announce(weights, engine.dtype)
    engine.connect(Held(weights))
    version = 0
    channel.send(None)
    while channel.receive() is not None:
        began = time.perf_counter()
        engine.load(manifest, version)
        channel.send(time.perf_counter() - began)
        version += 1


def pushes(model: Path, data: rft.RFTDataModule, transport: Transport, steps: int) -> list[float]:
    """Seconds of every push of a fit but the first."""
    found = spans(rft.Synchronous(transport=transport), Consumes(model), data, steps)
    mine = [span for span in found if span.track == "trainer" and span.what in ("sync", "write checkpoint")]
    return [span.end - span.begin for span in sorted(mine, key=lambda span: span.begin)[1:]]


def memcpy(size: int) -> Iterator[float]:
    """Seconds of a copy, again and again."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    while True:
        began = time.perf_counter()
        target.copy_(source)
        yield time.perf_counter() - began


def bytes_of(model: Path) -> int:
    """Size of the weights in the engines' dtype; those of aliases once."""
    dtype = fast_dtype("cuda" if torch.cuda.is_available() else "cpu")
    weights = policy(model, dtype)
    sizes = zip(weights, announce(weights, dtype), strict=True)
    return sum({tensor.data_ptr(): nbytes(info) for (_, tensor), info in sizes}.values())


def data_of(explorers: int) -> rft.RFTDataModule:
    """As little to explore as there can be."""
    return rft.RFTDataModule(
        tasks=["1 + 1 ="],
        reward=restless,
        engine=rft.VLLMEngine(max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN),
        explorers=explorers,
        tasks_per_step=1,
        samples_per_task=2,
        max_new_tokens=1,
    )


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pushes", type=int, default=4, help="that count, in each round")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a look at the benchmark itself")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    torch.set_num_threads(available_cpus())
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.tiny:
            model = tiny_model(folder / "tiny")
        else:
            from convert_smollm2 import smollm2

            model = smollm2(Path("runs/models/SmolLM2-135M-Instruct"))
        size = bytes_of(model)
        copies = memcpy(size)
        next(copies)  # both buffers are in use from now on
        with beside("benchmarks.weight_sync") as channel:
            channel.send(model)
            channel.receive(DEADLINE_S)  # up; so that neither start disturbs the other's
            channel.send("warm up")
            channel.receive(DEADLINE_S)
            for explorers in (1, 2):
                with data_of(explorers) as data:
                    for _ in range(arguments.rounds):
                        for transport, made in TRANSPORTS.items():
                            name = f"{transport}_{explorers}_explorer{'s' * (explorers > 1)}_s"
                            seconds.setdefault(name, []).extend(pushes(model, data, made(folder), arguments.pushes))
                            print(name, *(f"{second:.3f}" for second in seconds[name]), flush=True)
                        for _ in range(arguments.pushes):
                            channel.send("reload")
                            seconds.setdefault("reload_s", []).append(channel.receive(DEADLINE_S))
                            seconds.setdefault("memcpy_s", []).append(next(copies))
                        for name in ("reload_s", "memcpy_s"):
                            print(name, *(f"{second:.3f}" for second in seconds[name]), flush=True)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    extra = {
        f"{transport}_extra_memcpys": (found[f"{transport}_1_explorer_s"] - found["reload_s"]) / found["memcpy_s"]
        for transport in TRANSPORTS
    }
    results = {name: round(value, 2) for name, value in extra.items()}
    results |= {name: round(value, 4) for name, value in found.items()} | {"mib": round(size / 2**20, 1)}
    if not arguments.tiny:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "weight_sync.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, value in results.items():
        print(f"{name:26} {value:8}", *(f"{second:.3f}" for second in seconds.get(name, [])))


if __name__ == "__main__":
    one_of_two(main, reload)
