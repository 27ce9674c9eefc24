"""Explorers that dial in, as processes on the loopback interface: they come, die, come again, and end with the run."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.errors import ConfigurationError, DeadlineError, ExplorerError
from lightning_rft.experience import GroupKey, Task
from lightning_rft.explorer import join as joining
from lightning_rft.explorer.about import About
from lightning_rft.explorer.dial_in import DialIn
from lightning_rft.explorer.join import join
from lightning_rft.explorer.launcher import Place
from lightning_rft.explorer.messages import Died, Explore, Explored, Started
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.secret import VARIABLE, read_secret
from lightning_rft.settings import Sampling
from tests.explorer.light_spec import light_spec
from tests.processes import MARK, LightEngine, alive, until

ROOT = Path(__file__).parents[2]
Joiner = subprocess.Popen[bytes]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In the environment of every process that the test starts; in the end there must be none."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.delenv(VARIABLE, raising=False)
    yield mark
    until(lambda: not alive(mark), f"the end of {alive(mark)}", timeout_s=10)


def make_pool(model: Path, folder: Path, *, count: int = 1, start_s: float = 60, max_restarts: int = 5) -> Any:
    spec = light_spec(model, start_s=start_s)
    pool = ExplorerPool(spec.engine, count, log_dir=folder, max_restarts=max_restarts, launcher=DialIn())
    pool.start(spec)
    return pool


@pytest.fixture
def joiners(tmp_path: Path) -> Iterator[Callable[..., Joiner]]:
    """Starts ``lightning-rft join``, with its output in a file."""
    started: list[Joiner] = []

    def start(command: str, *options: str) -> Joiner:
        program, *arguments = shlex.split(command)
        assert program == "lightning-rft"
        with open(tmp_path / f"joiner-{len(started)}", "wb") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "lightning_rft", *arguments, *options],
                    stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                )
            )  # fmt: skip
        return started[-1]

    yield start
    for joiner in started:
        joiner.kill()
        joiner.wait()


def heard(pool: ExplorerPool, kind: type, count: int = 1) -> list[tuple[int, Any]]:
    found: list[tuple[int, Any]] = []

    def enough() -> bool:
        found.extend((index, message) for index, message in pool.poll(0.2) if isinstance(message, kind))
        return len(found) >= count

    until(enough, f"{count} {kind.__name__}")
    return found


def explorers(mark: str) -> list[int]:
    """Process ids of the explorers alone."""
    return [pid for pid, command in alive(mark).items() if "worker.main" in command]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_they_come_and_go(tiny_model_path: Path, tmp_path: Path, mark: str, joiners: Callable[..., Joiner]) -> None:
    pool = make_pool(tiny_model_path, tmp_path / "logs", count=2)
    launcher = pool.launcher
    assert listens(launcher.port) == {"127.0.0.1"}
    first = [joiners(launcher.command, "--again", "0") for _ in range(2)]
    assert [index for index, _ in heard(pool, Started, 2)] in ([0, 1], [1, 0])
    assert pool.ready and pool.up.keys() == {0, 1}
    spare = joiners(launcher.command, "--again", "0")  # waits for a place
    for index in range(2):
        pool.send(index, Explore(0, GroupKey(0, index), 1, Task("1", id=str(index)), (1,), Sampling(8, 1.0)))
    assert {index: message.task_id for index, message in heard(pool, Explored, 2)} == {0: "0", 1: "1"}

    secret = (tmp_path / "logs" / "join-secret").read_text().strip()
    assert os.stat(tmp_path / "logs" / "join-secret").st_mode & 0o777 == 0o600
    for pid in alive(mark):
        for file in ("cmdline", "environ"):
            assert secret.encode() not in Path(f"/proc/{pid}/{file}").read_bytes()

    victim = explorers(mark)[0]
    (ended,) = [joiner for joiner in first if joiner.pid == parent(victim)]
    os.kill(victim, signal.SIGKILL)
    ((died, message),) = heard(pool, Died)
    assert f"explorer {died} is gone: its connection has ended; see the output of" in str(message.error)
    assert [index for index, _ in heard(pool, Started)] == [2]  # the one that waited, as a new explorer
    assert ended.wait(10) == 0
    (other,) = [joiner for joiner in first if joiner is not ended]

    other.kill()  # its explorer ends with it
    heard(pool, Died)
    assert pool.up.keys() == {2}
    until(lambda: not pool.poll(0.1) and pool.ready, "a run that goes on without it")  # after a pause
    late = joiners(launcher.command)
    assert [index for index, _ in heard(pool, Started)] == [3]
    late.terminate()
    heard(pool, Died)
    assert late.wait(10) == -signal.SIGTERM
    assert pool.restarts == 3
    pool.stop()
    assert spare.wait(10) == 0
    until(lambda: not alive(mark), "the end of all", timeout_s=5)
    assert not (tmp_path / "logs" / "join-secret").exists()
    assert listens(launcher.port) == set()
    for log in tmp_path.glob("joiner-*"):
        assert secret not in log.read_text()


def listens(port: int) -> set[str]:
    """Addresses at which this machine listens at a port."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        address, _, number = local.partition(":")
        if state == "0A" and int(number, 16) == port:
            found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]))
    return found


TRAINER = """
import sys, time
import lightning_rft as rft
from tests.processes import LightEngine
pool = rft.ExplorerPool(LightEngine(), launcher=rft.DialIn(), log_dir=sys.argv[1])
pool.launch()
while True:
    pool.poll(1)
"""


def test_an_explorer_ends_with_a_trainer_that_is_killed(
    tmp_path: Path, mark: str, joiners: Callable[..., Joiner]
) -> None:
    command = [sys.executable, "-c", TRAINER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        try:
            joiner = joiners(trainer.stdout.readline().split("`")[1], "--again", "0")
            until(lambda: explorers(mark), "an explorer")
        finally:
            trainer.kill()
    assert joiner.wait(10) == 0
    until(lambda: not alive(mark), "the end of all", timeout_s=5)


def test_nobody_comes(tiny_model_path: Path, tmp_path: Path, mark: str) -> None:
    pool = make_pool(tiny_model_path, tmp_path, count=2, start_s=0.3)
    try:
        with pytest.raises(DeadlineError) as caught:
            heard(pool, Started)
    finally:
        pool.stop()
    command = rf"lightning-rft join 127.0.0.1:{pool.launcher.port} --secret-file {tmp_path}/join-secret"
    assert str(caught.value) == (
        f"explorers have taken 0 of 2 places within Timeouts(start_s=0.3): for each explorer run `{command}`, or raise "
        "the setting"
    )


def test_one_death_too_many(tiny_model_path: Path, tmp_path: Path, mark: str, joiners: Callable[..., Joiner]) -> None:
    pool = make_pool(tiny_model_path, tmp_path, max_restarts=0)
    joiner = joiners(pool.launcher.command, "--again", "0")
    heard(pool, Started)
    joiner.kill()
    with pytest.raises(ExplorerError, match=r"explorer 0 is gone: its connection has ended \(max_restarts=0 within"):
        heard(pool, Died)
    pool.stop()


# Without processes


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DialIn]:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(joining, "_RETRY_S", 0.05)
    launcher = DialIn()
    launcher.open(tmp_path, 1)
    yield launcher
    launcher.close()


def address(launcher: DialIn) -> str:
    return f"127.0.0.1:{launcher.port}"


def place(tmp_path: Path) -> Place:
    return Place(0, LightEngine(), None, None, tmp_path)


def test_one_with_another_secret_is_told_at_once(listening: DialIn) -> None:
    with pytest.raises(ConfigurationError, match="does not take this secret: it is another run's"):
        join(address(listening), b"another" * 9, wait_s=30, again_s=0)


def test_one_of_another_version_is_told_what_to_install(
    listening: DialIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = About.this()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            join(address(listening), read_secret(tmp_path / "join-secret"), wait_s=30, again_s=0)
        except ConfigurationError as error:
            errors.append(error)

    with monkeypatch.context() as patch:
        patch.setattr(About, "this", classmethod(lambda cls, slot: cls("node7", 1, "cpython 2.7", "0.0.1")))
        thread = threading.Thread(target=run)
        thread.start()
        assert listening._entrance is not None
        reception = listening._entrance._reception
        until(lambda: reception._guests, "its coming", timeout_s=10)
    assert listening.launch(place(tmp_path)) is None
    thread.join(10)
    reason = f"the trainer has {ours.python} and lightning_rft {ours.version}, but node7 has cpython 2.7"
    assert reason in str(errors[0])
    assert reason in listening.missing


def test_one_that_cannot_rebuild_the_engine_says_so(listening: DialIn, tmp_path: Path) -> None:
    class Engine(LightEngine):
        def environment(self, threads: int) -> dict[str, str]:
            raise ImportError("no such library here")

    errors: list[BaseException] = []

    def run() -> None:
        try:
            join(address(listening), read_secret(tmp_path / "join-secret"), wait_s=30, again_s=0)
        except ImportError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    at = Place(0, Engine(), None, None, tmp_path)
    process = until(lambda: listening.launch(at), "its coming", timeout_s=10)
    error = process.channel.receive(10).failure.unpack("explorer 0")
    assert isinstance(error, ImportError)
    thread.join(10)
    assert errors
    assert process.status(5) == "is gone: its connection has ended"
    process.kill()
    process.channel.close()


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_RETRY_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=f"no trainer had a place at localhost:{port} within 0.2 seconds"):
        join(f"localhost:{port}", b"5" * 64, wait_s=0.2, again_s=0)
    assert time.monotonic() - began < 5


def test_a_port_is_kept_for_those_who_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    launcher = DialIn()
    seen = set()
    for _ in range(2):
        launcher.open(tmp_path, 1)
        seen.add((launcher.port, (tmp_path / "join-secret").read_text()))
        launcher.close()
    assert len(seen) == 1


def test_the_environments_secret_goes_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "from-the-environment")
    launcher = DialIn(address="node0")
    launcher.open(tmp_path, 1)
    assert launcher.command == f"lightning-rft join node0:{launcher.port}"
    assert list(tmp_path.iterdir()) == []
    launcher.close()
    assert read_secret("nowhere") == b"from-the-environment"


@pytest.mark.parametrize(
    ("text", "mode", "match"),
    [
        ("5" * 64, 0o640, "others can read or change the secret in .*: chmod 600"),
        ("short\n", 0o600, "has 5 characters, and needs at least 16"),
        (None, 0o600, "cannot be read from"),
    ],
)
def test_a_secret_that_is_none(
    text: str | None, mode: int, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    file = tmp_path / "secret"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(ConfigurationError, match=match):
        read_secret(file)


@pytest.mark.parametrize("bind", ["29600", "localhost", "localhost:", "localhost:x", "localhost:70000"])
def test_an_address_that_is_none(bind: str) -> None:
    with pytest.raises(ConfigurationError, match="is no HOST:PORT"):
        DialIn(bind=bind)


def test_an_address_that_is_anothers(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"DialIn\(bind='192.0.2.1:0'\) cannot be listened at"):
        DialIn(bind="192.0.2.1:0").open(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
