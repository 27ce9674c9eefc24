"""A Ray cluster of two machines: runs in all modes while the line between them is cut, and one of them is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from lightning_rft.buffer.ledger import State
from tests.explorer.test_dial_in import ROOT, explorers
from tests.explorer.test_ray import TRAINER
from tests.killed_runs import STRATEGIES, TASKS, check_every_task_ended_once
from tests.machines import INTERFACE, Machine, Machines
from tests.processes import MARK, Script, Zygote, alive, until
from tests.ray_cluster import SETTINGS, end_all

pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.chaos

PORT = 6379
SILENCE_S = 3
# not before the line is mended does Ray take a node for dead, which it then is: it ends itself when it hears that
PATIENT = SETTINGS | {"RAY_health_check_failure_threshold": "30"}
TRANSPORTS = "CollectiveTransport", "CheckpointTransport"


class Nodes:
    """A cluster with its head on the first machine; ``mark`` is in the environment of all of its processes."""

    def __init__(self, machines: Machines, logs: Path) -> None:
        self.mark = uuid.uuid4().hex
        self._machines = machines
        self._logs = logs
        self._folder = tempfile.mkdtemp(prefix="ray-")  # short: it is part of sockets' names
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, machine: Machine) -> None:
        """Starts the node of a machine, and returns when it has joined."""
        head = machine == self._machines.one
        # Ray looks for its own address on the way to the internet
        route = ["ip", "-n", machine.name, "route", "replace", "default", "dev", INTERFACE]
        subprocess.run(route, check=True)
        log = self._logs / f"node-{len(self._processes)}"
        with open(log, "wb") as output:
            self._processes.append(
                subprocess.Popen(
                    machine.command(
                        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1",
                        f"--node-ip-address={machine.address}", f"--object-store-memory={80 * 2**20}",
                        *(["--head", f"--port={PORT}", "--include-dashboard=false"] if head else []),
                        *([] if head else [f"--address={self._machines.one.address}:{PORT}"]),
                    ),
                    stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                    env=os.environ | PATIENT | machine.variables
                    | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: self.mark, "RAY_TMPDIR": self._folder},
                )
            )  # fmt: skip
        until(lambda: "Ray runtime started" in log.read_text(), log.read_text() or str(log), timeout_s=120)

    def kill(self, machine: Machine) -> None:
        """Ends all that runs on a machine."""
        for pid in self.on(machine, alive(self.mark)):
            with contextlib.suppress(ProcessLookupError):  # it has ended with another one
                os.kill(pid, signal.SIGKILL)

    def explorers(self) -> Counter[str]:
        """How many there are on each machine, by name."""
        return Counter(
            {
                machine.name: len(self.on(machine, explorers(self.mark)))
                for machine in (self._machines.one, self._machines.two)
            }
        )

    def on(self, machine: Machine, pids: Iterable[int]) -> list[int]:
        """Those of the processes that run on a machine."""
        here, found = os.stat(f"/run/netns/{machine.name}").st_ino, []
        for pid in pids:
            with contextlib.suppress(OSError):  # it has just ended
                if os.stat(f"/proc/{pid}/ns/net").st_ino == here:
                    found.append(pid)
        return found

    def close(self) -> None:
        end_all(self.mark)
        for process in self._processes:
            process.wait(10)
        shutil.rmtree(self._folder, ignore_errors=True)


@pytest.fixture
def nodes(machines: Machines, tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(machines, tmp_path)
    try:
        nodes.start(machines.one)
        nodes.start(machines.two)
        yield nodes
    finally:
        nodes.close()


@pytest.fixture
def script(nodes: Nodes, machines: Machines, zygote: Zygote, tmp_path: Path, tiny_model_path: Path) -> Iterator[Script]:
    """A trainer on the first machine."""
    enter = f"from tests.machines import enter\nenter({machines.one.name!r})\n"
    trains = TRAINER.format(cluster=f"{machines.one.address}:{PORT}", silence_s=SILENCE_S, meet=MEET)
    script = zygote.start(enter + trains, tmp_path, tiny_model_path, variables=machines.one.variables)
    yield script
    script.kill()


# the runs that wait after two of their four steps for what befalls them
MEET = (
    "Synchronous-CollectiveTransport",
    "OneStepOffPolicy-CollectiveTransport",
    "FullyAsynchronous-CollectiveTransport",
    "MultiExplorerAsynchronous-CollectiveTransport",
    "Synchronous-CheckpointTransport",
    "OneStepOffPolicy-CheckpointTransport",
)


def test_runs_outlive_what_befalls_the_line_and_the_other_machine(
    script: Script, nodes: Nodes, machines: Machines, tmp_path: Path
) -> None:
    both, one = {machines.one.name: 1, machines.two.name: 1}, {machines.one.name: 1, machines.two.name: 0}
    runs = iter(MEET)

    def reached() -> str:
        run = next(runs)
        script.wait_for(f"{run}.reached")
        return run

    def go_on(run: str) -> None:
        (tmp_path / f"{run}.done").touch()

    run = reached()
    assert nodes.explorers() == both
    machines.cut()
    go_on(run)
    time.sleep(0.7)  # a short cut
    machines.mend()

    run = reached()
    machines.cut()
    go_on(run)
    until(lambda: nodes.explorers() == one, "the end of the explorer that is cut off")

    run = reached()
    assert nodes.explorers() == one
    machines.mend()
    until(lambda: nodes.explorers() == both, "its return")
    (old,) = nodes.on(machines.two, explorers(nodes.mark))
    os.kill(old, signal.SIGKILL)
    go_on(run)

    run = reached()
    until(lambda: nodes.explorers() == both, "its return")
    nodes.kill(machines.two)
    go_on(run)

    run = reached()
    assert nodes.explorers() == one
    nodes.start(machines.two)
    until(lambda: nodes.explorers() == both, "the return of the machine's explorer")
    go_on(run)

    run = reached()
    machines.cut()  # for good: two more runs are trained with one
    go_on(run)

    assert script.wait(120) == 0, script.stderr
    whole = [f"{name}-{transport}" for transport in TRANSPORTS for name in STRATEGIES]
    assert json.loads(script.stdout) == {**dict.fromkeys(whole, 4), "restarts": 4}
    for run in whole:
        assert check_every_task_ended_once(tmp_path / f"{run}.sqlite", 1) == {State.TRAINED: len(TASKS)}
    script.gone()
