"""The end of explorers' processes, of some that do not end when they are killed too."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_rft.explorer import launcher
from lightning_rft.explorer.launcher import end_all
from lightning_rft.explorer.local import LocalProcess
from tests.processes import MODEL, LightEngine, fit

pytestmark = pytest.mark.usefixtures("one_thread")

GRACE_S = 0.2


class Held(LocalProcess):
    """A process that the kernel holds: SIGKILL is sent, and nothing happens."""

    def kill(self) -> None:
        pass


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Held]]:
    monkeypatch.setattr(launcher, "GRACE_S", GRACE_S)
    processes = [Held({}, tmp_path / f"explorer-{slot}.log") for slot in range(3)]
    yield processes
    for process in processes:
        LocalProcess.kill(process)
        assert process.status(30) is not None


def test_a_process_that_outlives_its_kill_is_named_and_waited_for_no_longer(
    held: list[Held], caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        end_all(held, grace_s=0)
    assert time.monotonic() - began < 2 * GRACE_S  # all at once, not one after another
    for process in held:
        assert f"Process {process.pid} was killed and is not gone" in caplog.text
        with pytest.raises(OSError, match="closed"):
            process.channel.send(None)


@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")
def test_a_finished_fit_does_not_raise_for_such_a_process(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(LightEngine):
        def stop(self) -> None:
            time.sleep(3600)

    monkeypatch.setattr(launcher, "GRACE_S", GRACE_S)
    monkeypatch.setattr(LocalProcess, "kill", Held.kill)
    monkeypatch.setenv(MODEL, str(tiny_model_path))
    monkeypatch.chdir(tmp_path)
    assert fit(engine=Stuck()).global_step == 3
    assert "was killed and is not gone" in caplog.text
