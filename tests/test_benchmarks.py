"""What the benchmarks share."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.beside import DEADLINE_S, beside, one_of_two
from lightning_rft.channel import Channel


def asks() -> None:
    with beside("tests.test_benchmarks") as channel:
        channel.send([1, 2])
        print(channel.receive(DEADLINE_S))


def answers(channel: Channel) -> None:
    channel.send(sum(channel.receive(DEADLINE_S)))


def test_a_benchmark_and_its_other_process_are_one_module() -> None:
    found = subprocess.run([sys.executable, "-m", "tests.test_benchmarks"], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == (0, "3\n"), found.stderr


if __name__ == "__main__":
    one_of_two(asks, answers)
