"""Explorers on a Ray cluster of two nodes: runs in all modes that lose an explorer and a node, and bad settings."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.buffer.ledger import State
from lightning_rft.errors import ConfigurationError, DeadlineError, ExplorerError
from lightning_rft.explorer.about import About
from lightning_rft.explorer.messages import Died, Started
from lightning_rft.explorer.on_ray import launcher as launching
from lightning_rft.explorer.on_ray import reservation as reserving
from lightning_rft.explorer.on_ray.launcher import RayLauncher
from lightning_rft.explorer.on_ray.messages import Reserve
from lightning_rft.explorer.on_ray.reservation import Reservation
from lightning_rft.explorer.on_ray.shortage import shortage
from lightning_rft.explorer.pool import ExplorerPool
from tests.explorer.light_spec import light_spec
from tests.explorer.test_dial_in import ROOT, explorers, heard
from tests.killed_runs import STRATEGIES, TASKS, check_every_task_ended_once
from tests.processes import Script, alive, until
from tests.ray_cluster import RayCluster, ray_cluster

IDLE = {"CPU": 0.0, "groups": []}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        yield cluster
    until(lambda: not alive(cluster.mark), f"the end of {alive(cluster.mark)}", timeout_s=10)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """At the end of a test the cluster is as if nothing had ever run there."""
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        until(lambda: not explorers(cluster.mark), f"the end of {explorers(cluster.mark)}", timeout_s=10)
        until(lambda: cluster.in_use == IDLE, "the end of what was reserved", timeout_s=10)


# Whole runs

TRAINER = """
import json, os
import torch
from lightning.pytorch.callbacks import Callback
import lightning_rft as rft
from tests.killed_runs import STRATEGIES, TASKS, TASKS_PER_STEP
from tests.processes import MODEL, LightEngine, touch, until
from tests.trainer_and_data import fake_data, quiet_trainer

torch.set_num_threads(1)

class Meet(Callback):
    def __init__(self, name):
        self.name = name

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            touch(self.name + ".reached")
            until(lambda: os.path.exists(self.name + ".done"), "what the test does")

pool = rft.ExplorerPool(
    LightEngine(tokens_per_second=200, mean_tokens=5), 2, max_restarts=9,
    launcher=rft.RayLauncher({cluster!r}, silence_s={silence_s}),
)
data = fake_data(
    tasks=TASKS, explorers=pool, tasks_per_step=TASKS_PER_STEP, sampling=rft.Sampling(seed=0), max_new_tokens=8,
    timeouts=rft.Timeouts(start_s=120, progress_s=60),
)
result = {{}}
with data:
    for transport in ("CollectiveTransport", "CheckpointTransport"):
        for name, settings in STRATEGIES.items():
            run = name + "-" + transport
            data.buffer = rft.Buffer(run + ".sqlite")
            strategy = getattr(rft, name)(transport=getattr(rft, transport)(), **settings)
            trainer = quiet_trainer(".", strategy, *[Meet(run)] * (run in {meet!r}), max_epochs=1)
            trainer.fit(rft.RFTModule(os.environ[MODEL]), data)
            result[run] = trainer.global_step
    result["restarts"] = pool.restarts
print(json.dumps(result))
"""


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def nodes(mark: str) -> set[str]:
    """What tells apart the nodes on which there are explorers."""
    return {environment(pid)["RAY_RAYLET_PID"] for pid in explorers(mark)}


def test_runs_outlive_the_loss_of_an_explorer_and_of_a_node(
    start: Callable[[str], Script], cluster: RayCluster, tmp_path: Path
) -> None:
    death, loss, return_ = (
        "Synchronous-CollectiveTransport",
        "MultiExplorerAsynchronous-CollectiveTransport",
        "OneStepOffPolicy-CheckpointTransport",
    )
    script = start(TRAINER.format(cluster=cluster.address, silence_s=60, meet=(death, loss, return_)))

    script.wait_for(f"{death}.reached")
    first = explorers(cluster.mark)
    assert len(first) == len(nodes(cluster.mark)) == 2
    os.kill(first[0], signal.SIGKILL)
    until(lambda: len(set(explorers(cluster.mark)) - set(first)) == 1, "its return")
    (tmp_path / f"{death}.done").touch()

    script.wait_for(f"{loss}.reached")
    cluster.remove_node()
    until(lambda: len(explorers(cluster.mark)) == 1, "the loss of one")
    (tmp_path / f"{loss}.done").touch()

    script.wait_for(f"{return_}.reached")
    assert len(explorers(cluster.mark)) == 1
    cluster.add_node()
    until(lambda: len(nodes(cluster.mark)) == 2, "the return of the node's explorer")
    (tmp_path / f"{return_}.done").touch()

    assert script.wait(120) == 0, script.stderr
    runs = [
        f"{name}-{transport}" for transport in ("CollectiveTransport", "CheckpointTransport") for name in STRATEGIES
    ]
    assert json.loads(script.stdout) == {**dict.fromkeys(runs, 4), "restarts": 2}  # and Ray has printed nothing
    assert "(raylet)" not in script.stderr and "existing Ray cluster" not in script.stderr
    for run in runs:
        assert check_every_task_ended_once(tmp_path / f"{run}.sqlite", 1) == {State.TRAINED: len(TASKS)}


KILLED = """
import os, sys
import lightning_rft as rft
from tests.processes import LightEngine
pool = rft.ExplorerPool(LightEngine(), 2, launcher=rft.RayLauncher(sys.argv[1]), log_dir=sys.argv[2])
pool.launch()
while True:
    pool.poll(1)
"""


def test_explorers_end_with_a_trainer_that_is_killed(cluster: RayCluster, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, cluster.address, str(tmp_path)], cwd=ROOT) as trainer:
        try:
            until(lambda: len(explorers(cluster.mark)) == 2, "two explorers")
            assert cluster.in_use["groups"] == ["CREATED"]  # at the end of the test there is none
        finally:
            trainer.kill()


# Pools


@pytest.fixture
def make_pool(tiny_model_path: Path, tmp_path: Path) -> Iterator[Callable[..., ExplorerPool]]:
    pools = []

    def make(launcher: RayLauncher, count: int = 1, start_s: float = 60) -> ExplorerPool:
        spec = light_spec(tiny_model_path, start_s=start_s)
        pools.append(ExplorerPool(spec.engine, count, log_dir=tmp_path, launcher=launcher))
        pools[-1].start(spec)
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()


def test_the_process_that_talks_to_ray_may_die(
    make_pool: Callable[..., ExplorerPool], cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_PAUSE_S", 0.1)
    launcher = RayLauncher(cluster.address, num_gpus=1, runtime_env={"env_vars": {"OF_THIS_TEST": "1"}})
    pool = make_pool(launcher)
    heard(pool, Started)
    (explorer,) = explorers(cluster.mark)
    assert environment(explorer).items() >= {"CUDA_VISIBLE_DEVICES": "0", "OF_THIS_TEST": "1"}.items()
    secret = launcher._secret
    for pid in alive(cluster.mark):
        for file in ("cmdline", "environ"):
            assert secret not in Path(f"/proc/{pid}/{file}").read_bytes()
    os.kill(explorer, signal.SIGKILL)
    ((_, died),) = heard(pool, Died)
    assert str(died.error).startswith("explorer 0 ended with status -9; the end of ")
    assert str(died.error).endswith("exploring at place 0")
    heard(pool, Started)

    assert launcher._reservation is not None
    os.kill(launcher._reservation._process.pid, signal.SIGKILL)
    heard(pool, Died)
    reason = "the process that talks to Ray has ended with status -9"
    until(lambda: not pool.poll(0.1) and reason in launcher.missing, "the notice of it")
    heard(pool, Started)
    assert pool.restarts == 2 and launcher._trouble == ""


def test_too_little_room(make_pool: Callable[..., ExplorerPool], cluster: RayCluster) -> None:
    pool = make_pool(RayLauncher(cluster.address, num_gpus=2, timeout_s=8), count=3)
    began = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        heard(pool, Started)
    assert time.monotonic() - began < 8 + 10
    assert (
        "Ray has not reserved 1 CPU and 2 GPU for each of 3 explorers within RayLauncher(timeout_s=8): 3 CPU are "
        "needed, but 2 nodes have 2 in all; 6 GPU are needed, but 2 nodes have 2 in all. `ray status`"
    ) in str(caught.value)


def test_one_that_is_refused_says_why(
    make_pool: Callable[..., ExplorerPool], cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = About.this()
    monkeypatch.setattr(About, "this", classmethod(lambda cls: cls("node0", 1, ours.python, "0.0.1")))
    pool = make_pool(RayLauncher(cluster.address))
    with pytest.raises(ExplorerError) as caught:
        heard(pool, Started)
    assert "explorer 0 could not begin on its node: " in str(caught.value)
    assert f"the trainer has {ours.python} and lightning_rft 0.0.1, but " in str(caught.value)


def test_no_cluster(make_pool: Callable[..., ExplorerPool]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"127.0.0.1:{server.getsockname()[1]}"
    pool = make_pool(RayLauncher(nobody))
    with pytest.raises(ConfigurationError, match=rf"cluster='{nobody}'\) cannot connect to a Ray cluster \(.*refused"):
        heard(pool, Started)


def test_a_cluster_that_does_not_answer(
    make_pool: Callable[..., ExplorerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserving, "_MORE_S", 2.0)
    monkeypatch.setattr(reserving, "_END_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"127.0.0.1:{server.getsockname()[1]}"
        pool = make_pool(RayLauncher(silent, timeout_s=1))
        began = time.monotonic()
        with pytest.raises(DeadlineError, match=f"no Ray cluster has answered at cluster='{silent}' within"):
            heard(pool, Started)
        assert time.monotonic() - began < 60, "Ray itself gives up after five minutes"


def test_a_trainer_that_is_gone_ends_a_process_that_waits_for_ray(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"127.0.0.1:{server.getsockname()[1]}"
        reservation = Reservation(Reserve(silent, 1, {"CPU": 1}, None, 0, 60, None), tmp_path / "ray.log")
        try:
            server.settimeout(60)
            server.accept()[0].close()
            reservation._channel.close()
            assert reservation._process.wait(30) == 1
        finally:
            reservation.close()


# Without Ray


def test_ray_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"not installed: pip install 'lightning-rft\[ray\]'"):
        RayLauncher()


@pytest.mark.parametrize(
    "settings", [{"num_cpus": -1}, {"num_gpus": -1}, {"timeout_s": 0}, {"silence_s": 0.5}, {"bind": "29600"}], ids=str
)
def test_settings_that_cannot_work(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"RayLauncher\\(.*{next(iter(settings))}="):
        RayLauncher(**settings)


@pytest.mark.parametrize(
    ("count", "bundle", "nodes", "free", "reason"),
    [
        (2, {"CPU": 1}, [], {}, "2 CPU are needed, but 0 nodes have 0 in all"),
        (1, {"GPU": 4}, [{"GPU": 2}, {"GPU": 2}], {"GPU": 4}, "4 GPU on one node are needed, but the largest has 2"),
        (2, {"GPU": 1}, [{"GPU": 2}], {"GPU": 1}, "2 GPU are needed, but 1 of 2 are free"),
        (3, {"GPU": 2}, [{"GPU": 3}, {"GPU": 3}], {"GPU": 6}, "single nodes have room for 2"),
        (1, {"GPU": 2}, [{"GPU": 2}, {"GPU": 2}], {"GPU": 2}, "no single nodes have as much free"),
        (2, {"CPU": 4, "GPU": 1}, [{"CPU": 8}, {"GPU": 8}], {"CPU": 8, "GPU": 8}, "single nodes have room for 0"),
    ],
)  # fmt: skip
def test_what_is_missing(
    count: int,
    bundle: Mapping[str, float],
    nodes: list[Mapping[str, float]],
    free: Mapping[str, float],
    reason: str,
) -> None:
    assert shortage(count, bundle, nodes, free) == reason
