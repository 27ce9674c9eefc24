"""Nothing of a run listens where another machine could reach it."""

from __future__ import annotations

import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import pytest

import lightning_rft as rft
from lightning_rft.errors import RankError
from lightning_rft.sync.transports.gloo import GlooSender
from lightning_rft.trainer import rendezvous
from tests.processes import LightEngine
from tests.trainer_and_data import SUMS, fake_data, quiet_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def listening() -> set[str]:
    """Addresses at which this process and all that it started listen."""
    ours = psutil.Process()
    lines = [line for process in (ours, *ours.children(recursive=True)) for line in process.net_connections("inet")]
    return {line.laddr.ip for line in lines if line.status == psutil.CONN_LISTEN}


class Look(L.Callback):
    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.looks = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen |= listening()
        self.looks += 1


def check(engine: rft.Engine, explorers: int, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look()
    join = GlooSender.join

    def watched(sender: GlooSender, members: Any, *rest: Any) -> None:
        connect = members.connect

        def connected(*link: Any) -> None:
            look.seen |= listening()  # while the group meets
            connect(*link)

        monkeypatch.setattr(members, "connect", connected)
        join(sender, members, *rest)

    monkeypatch.setattr(GlooSender, "join", watched)
    strategy = rft.Synchronous(transport=rft.CollectiveTransport(backend="gloo"))
    trainer = quiet_trainer(folder, strategy, look, max_steps=2)
    data = fake_data(tasks=SUMS[:3], engine=engine, explorers=explorers, tasks_per_step=1)
    trainer.fit(rft.RFTModule(model), data)
    assert look.looks == 2
    assert look.seen, "a Gloo group listens, for its members"
    assert all(ip_address(address).is_loopback for address in look.seen), look.seen


def test_a_run_listens_on_loopback_alone(tiny_model_path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    check(LightEngine(), 2, tiny_model_path, tmp_path, monkeypatch)


def test_a_rank_is_heard_only_with_the_runs_secret() -> None:
    secret = secrets.token_bytes(32)
    server = socket.create_server(("127.0.0.1", 0))
    host, port = server.getsockname()
    with rendezvous.gate_at(server, secret) as gate, ThreadPoolExecutor(1) as threads:
        welcomed = threads.submit(rendezvous.welcome, gate, 2, 20.0)
        with pytest.raises(RankError, match="does not take this secret"):
            rendezvous.join(host, port, bytes(32), 1)
        rank = rendezvous.join(host, port, secret, 1)
        (peer,) = welcomed.result(20).values()
        rank.send("here")
        assert peer.receive(20) == "here"
        rank.close()
        peer.close()


@pytest.mark.vllm
def test_tensor_parallel_workers_listen_on_loopback_alone(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    check(rft.VLLMEngine(dtype="float32", tensor_parallel_size=2), 1, tiny_model_path, tmp_path, monkeypatch)
