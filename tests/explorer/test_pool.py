"""Explorer processes: started once, listened to, and gone with everything they started."""

from __future__ import annotations

import gc
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.errors import DeadlineError, ExplorerError
from lightning_rft.experience import GroupKey, Task
from lightning_rft.explorer.messages import Explore, Explored, Started
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.explorer.spec import ExplorerSpec
from lightning_rft.explorer.workflows.single_turn import SingleTurn
from lightning_rft.model_folder import Pretrained
from lightning_rft.settings import Sampling, Timeouts, Tolerance
from tests.processes import MARK, LightEngine, alive, until


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In the environment of every process that the test starts; in the end there must be none."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield mark
    until(lambda: not alive(mark), f"the end of {alive(mark)}", timeout_s=10)


def make_pool(
    model: Path, log_dir: Path, *, count: int = 1, start_s: float = 60, max_restarts: int = 0, **changes: Any
) -> tuple[ExplorerPool, Callable[[], None]]:
    settings: dict[str, Any] = {
        "engine": LightEngine(),
        "model": Pretrained(str(model)),
        "workflow": SingleTurn(),
        "reward": lambda completion, task: 1.0,
        "max_model_len": 50,
        "seed": 0,
        "tolerance": Tolerance(retries=0),
        "timeouts": Timeouts(reward_s=30.0, workflow_s=30.0, start_s=start_s),
    }
    spec = ExplorerSpec(**settings | changes)
    pool = ExplorerPool(spec.engine, count, log_dir=log_dir, max_restarts=max_restarts)
    return pool, lambda: pool.start(spec)


def heard(pool: ExplorerPool, kind: type, count: int = 1) -> list[tuple[int, Any]]:
    found: list[tuple[int, Any]] = []

    def enough() -> bool:
        found.extend((index, message) for index, message in pool.poll(0.2) if isinstance(message, kind))
        return len(found) >= count

    until(enough, f"{count} {kind.__name__}")
    return found


def gone(mark: str) -> None:
    """Every process is killed by now; what an explorer has started may take a moment longer to be gone."""
    until(lambda: not alive(mark), "the end of all processes", timeout_s=1.0)


def explorers(mark: str) -> set[int]:
    """Process ids of the explorers alone."""
    return {pid for pid, command in alive(mark).items() if "worker.main" in command}


def test_a_life(tiny_model_path: Path, tmp_path: Path, mark: str) -> None:
    pool, start = make_pool(tiny_model_path, tmp_path / "logs", count=2)
    assert not pool.running and not pool.ready
    assert not alive(mark)
    pool.stop()  # nothing to stop
    start()
    first = explorers(mark)
    assert len(first) == 2
    start()  # nothing to start
    assert explorers(mark) == first
    assert pool.running and not pool.ready
    heard(pool, Started, 2)
    assert pool.ready
    assert {explorer: engine.world_size for explorer, engine in pool.up.items()} == {0: 1, 1: 1}
    assert pool.dtype == "float32"
    assert not pool.nccl
    for index in range(2):
        pool.send(index, Explore(0, GroupKey(0, index), 1, Task("1", id=str(index)), (1,), Sampling(8, 1.0)))
    answers = {index: message.experiences[0].task_id for index, message in heard(pool, Explored, 2)}
    assert answers == {0: "0", 1: "1"}
    assert len(alive(mark)) == 6  # each has a process for its rewards, and one that watches rank 0
    pool.stop()
    gone(mark)
    assert not pool.running and not pool.ready
    assert pool.up == {}
    pool.stop()
    assert sorted(log.name for log in (tmp_path / "logs").iterdir()) == ["explorer-0.log", "explorer-1.log"]


def test_a_pool_that_is_forgotten_ends(tiny_model_path: Path, tmp_path: Path, mark: str) -> None:
    pool, start = make_pool(tiny_model_path, tmp_path)
    start()
    heard(pool, Started)
    del pool, start
    gc.collect()
    gone(mark)


def hanging(log: str) -> LightEngine:
    class Hangs(LightEngine):
        def start(self, model: str, *, max_model_len: int, seed: int) -> None:
            print(log, flush=True)
            time.sleep(3600)

    return Hangs()


def test_an_engine_that_does_not_start_in_time(tiny_model_path: Path, tmp_path: Path, mark: str) -> None:
    pool, start = make_pool(tiny_model_path, tmp_path, start_s=0.3, engine=hanging("loading"))
    start()
    with pytest.raises(DeadlineError, match=r"0 of 1 .* Timeouts\(start_s=0.3\): see .*explorer-0.log, or raise"):
        heard(pool, Started)
    pool.stop()
    gone(mark)


def test_an_engine_that_does_not_start_at_all(tiny_model_path: Path, tmp_path: Path, mark: str) -> None:
    class Fails(LightEngine):
        def start(self, model: str, *, max_model_len: int, seed: int) -> None:
            raise OverflowError("out of memory")  # the line that is to blame

    pool, start = make_pool(tiny_model_path, tmp_path, engine=Fails())
    start()
    with pytest.raises(OverflowError, match="out of memory") as caught:
        heard(pool, Started)
    assert "the line that is to blame" in str(caught.value.__cause__)
    assert f"in explorer 0 (log: {tmp_path}" in str(caught.value.__cause__)
    pool.stop()


def test_death(tiny_model_path: Path, tmp_path: Path, mark: str) -> None:
    lines = "\n".join(f"line {number}" for number in range(30))
    pool, start = make_pool(tiny_model_path, tmp_path, engine=hanging(lines))
    start()
    until(lambda: "line 29" in (tmp_path / "explorer-0.log").read_text(), "the engine's log")
    (pid,) = explorers(mark)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ExplorerError, match=r"explorer 0 ended with status -9 \(max_restarts=0 ") as caught:
        heard(pool, Started)
    assert str(caught.value).splitlines()[1:] == [f"line {number}" for number in range(10, 30)]
    pool.send(0, "anything")  # there is nobody left to whom it matters
    pool.stop()


def test_what_is_stopped_or_ignores_requests_is_killed(tiny_model_path: Path, tmp_path: Path, mark: str) -> None:
    pool, start = make_pool(tiny_model_path, tmp_path)
    start()
    heard(pool, Started)
    (pid,) = explorers(mark)
    os.kill(pid, signal.SIGSTOP)
    pool.stop()
    gone(mark)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_a_launchers_variables_do_not_keep_the_only_trainer_from_starting(
    tiny_model_path: Path, tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An interactive job on a cluster has them, where one process trains; the trainer knows its own rank."""
    monkeypatch.setenv(name, "1")
    pool, start = make_pool(tiny_model_path, tmp_path)
    pool.launch()
    assert not pool.running  # no trainer yet, and perhaps one of many ranks
    start()
    heard(pool, Started)
    pool.stop()


def test_one_event_that_ends_all_explorers_is_one_death_of_each(
    tiny_model_path: Path, tmp_path: Path, mark: str
) -> None:
    pool, start = make_pool(tiny_model_path, tmp_path, count=3, max_restarts=1)
    start()
    heard(pool, Started, 3)
    for index in range(3):
        pool.kill(index, "was slow")
    heard(pool, Started, 3)
    assert pool.restarts == 3 and sorted(pool.up) == [3, 4, 5]
    pool.kill(4, "was slow once more")
    with pytest.raises(ExplorerError, match=r"explorer 4 was slow once more \(max_restarts=1 within"):
        heard(pool, Started)
    pool.stop()
