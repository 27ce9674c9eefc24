"""A Ray cluster on this machine, whose nodes come and go: processes that end with the one that started them.

Run as a program, it does what it reads, a word a line, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "LIGHTNING_RFT_TEST"  # as in processes.py, which this program has no use for

_START_S = 120.0  # for a node

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # eight seconds until a node that is gone counts as dead, where it would be a quarter of a minute
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "800",
    "RAY_health_check_failure_threshold": "10",
}


class RayCluster:
    """Two nodes of a CPU each, and of a GPU that there is not; ``mark`` is in the environment of all processes."""

    def __init__(self, process: subprocess.Popen[str], mark: str) -> None:
        self._process = process
        self.mark = mark
        self.address: str = self.ask("address")

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the cluster has ended before it could answer {what!r}"
        return json.loads(answer)

    def remove_node(self) -> None:
        """Kills all processes of the second node, as if its machine had lost its power."""
        self.ask("remove")

    def add_node(self) -> None:
        """Has a second node join again."""
        self.ask("add")

    @property
    def in_use(self) -> dict[str, Any]:
        """CPUs that are taken, and the states of placement groups that are not removed."""
        return dict(self.ask("in_use"))


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Starts a cluster and ends all of its processes."""
    mark, folder = uuid.uuid4().hex, tempfile.mkdtemp(prefix="ray-")  # short: it is part of sockets' names
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_cluster"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # its folder by the environment: the file that says which cluster is the machine's lies there as well
        env=os.environ | SETTINGS | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: mark, "RAY_TMPDIR": folder},
        start_new_session=True,
    )
    try:
        yield RayCluster(process, mark)
    finally:
        try:
            process.communicate(timeout=30)
        finally:
            end_all(mark)
            process.wait(10)
            shutil.rmtree(folder, ignore_errors=True)


def end_all(mark: str) -> None:
    """Kills all processes that have the mark in their environment."""
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)
        except OSError:  # it has just ended, or is another user's
            continue


def patient(get_node: Callable[..., Any]) -> Callable[..., Any]:
    """Waits longer for a node to start than the half a minute that Ray does: other tests may want the cores, too."""

    def get(*arguments: Any) -> Any:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                return get_node(*arguments)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    return get


def main() -> None:
    """Answers until the input ends."""
    from ray._private import services
    from ray.cluster_utils import Cluster

    services.get_node = patient(services.get_node)
    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = cluster.add_node(**node)
    for line in sys.stdin:
        answer: Any = None
        if line == "address\n":
            answer = cluster.address
        elif line == "remove\n":
            cluster.remove_node(second, allow_graceful=False)
        elif line == "add\n":
            second = cluster.add_node(**node)
        elif line == "in_use\n":
            groups = cluster.global_state.placement_group_table()
            free = cluster.global_state.available_resources().get("CPU", 0.0)
            answer = {
                "CPU": cluster.global_state.cluster_resources().get("CPU", 0.0) - free,
                "groups": [group["state"] for group in groups.values() if group["state"] != "REMOVED"],
            }
        print(json.dumps(answer), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
