"""What one sees in the terminal from ``fit`` to the first step: whole runs, and every screen that they showed."""

from __future__ import annotations

import _thread
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar

import lightning_rft as rft
from tests.terminal import HeldEngine, Recording
from tests.trainer_and_data import SUMS, fake_data, quiet_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = [
    "starting 1 explorer",
    "loading the model",
    "waiting for explorers",
    "pushing weights (version 0)",
    "exploring batch 0",
]


class Run:
    """A run whose explorer goes on only when the terminal says that it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path) -> None:
        self.monkeypatch = monkeypatch
        self.model = model
        self.folder = folder
        self.recording: Recording  # of the last call

    def touch(self, name: str) -> Callable[[Recording], None]:
        return lambda recording: (self.folder / name).touch()

    def see(
        self,
        call: str = "fit",
        *,
        bar: Callback | None = None,
        bar_first: bool = False,
        enable_progress_bar: bool = True,
        columns: int = 100,
        tty: bool = True,
        when: dict[str, Callable[[Recording], object]] | None = None,
        **settings: Any,
    ) -> Recording:
        recording = self.recording = Recording(
            columns,
            tty=tty,
            when={
                "aiting for explorers": self.touch("waiting"),
                "xploring batch 0": self.touch("exploring"),
                "xploring validation": self.touch("exploring"),
            }
            | (when or {}),
        )
        if not enable_progress_bar:
            self.touch("waiting")(recording)
            self.touch("exploring")(recording)
        callbacks: list[Callback] = [rft.Synchronous()]
        if bar is not None:
            callbacks.insert(0 if bar_first else 1, bar)
        with recording:
            self.monkeypatch.setattr(sys, "stdout", recording.stream)
            try:
                trainer = quiet_trainer(
                    self.folder,
                    *callbacks,
                    max_steps=2,
                    enable_progress_bar=enable_progress_bar,
                    num_sanity_val_steps=0,
                    limit_val_batches=1.0 if call == "validate" else 0,
                )
                data = fake_data(
                    **{
                        "tasks": SUMS[:4],
                        "val_tasks": [f"{index} + 2 =" for index in range(4)],
                        "engine": HeldEngine(self.folder),
                        "tasks_per_step": 2,
                    }
                    | settings
                )
                getattr(trainer, call)(rft.RFTModule(self.model), data)
            finally:
                self.monkeypatch.undo()
        return recording


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tiny_model_path: Path, tmp_path: Path) -> Run:
    return Run(monkeypatch, tiny_model_path, tmp_path)


def first_seen(recording: Recording, stages: list[str]) -> list[int]:
    """The first frame that shows each stage; each shows at most one line of ours."""
    for frame in recording.frames:
        assert sum(ours(line) for line in frame) <= 1, frame
    return [
        next(index for index, frame in enumerate(recording.frames) if any(stage[1:] in line for line in frame))
        for stage in stages
    ]


def ours(line: str) -> bool:
    return any(stage[1:] in line for stage in [*STAGES, "exploring validation", "training on batch", "pushing weights"])


def rests(screen: list[str]) -> list[str]:
    return [line for line in screen if line]


@pytest.mark.parametrize("bar_first", [False, True])
def test_tqdm(bar_first: bool, run: Run) -> None:
    seen = run.see(bar=TQDMProgressBar(), bar_first=bar_first)
    frames = first_seen(seen, [*STAGES, "training on batch 0", "pushing weights (version 1)"])
    assert frames == sorted(frames)
    exploring = [line for frame in seen.frames for line in frame if "exploring batch 0: 0 of 2 groups" in line]
    assert exploring
    assert all(line.startswith("Epoch 0:   0%|") and len(line) < 100 for line in exploring)
    (bar,) = rests(seen.screen)  # and no trace of ours
    assert bar.startswith("Epoch 0: 100%|")
    assert "rft/reward" in bar
    assert "rft/reward" in [line for frame in seen.frames for line in frame if "1/2" in line][-1]  # nor in its place
    assert not any("exploring batch 1" in line for frame in seen.frames for line in frame)


@pytest.mark.parametrize("bar_first", [False, True])
def test_rich(bar_first: bool, run: Run) -> None:
    pytest.importorskip("rich")
    run.monkeypatch.setenv("TTY_COMPATIBLE", "1")
    run.monkeypatch.setenv("COLUMNS", "100")
    seen = run.see(bar=RichProgressBar(), bar_first=bar_first)
    frames = first_seen(seen, [*STAGES, "training on batch 0", "pushing weights (version 1)"])
    assert frames == sorted(frames)
    (shown,) = {
        tuple(line.split(" ")[0] for line in rests(frame))
        for frame in seen.frames
        if any("xploring batch 0" in line and " 0/2 " in line for line in frame)
    }
    assert shown == ("Epoch", "Exploring")
    (bar,) = [line for line in rests(seen.screen) if "━" in line]
    assert bar.startswith("Epoch 0")
    assert " 2/2 " in bar
    assert not any(ours(line) for line in seen.screen)


class Percent(ProgressBar):
    """The example of Lightning's documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.enable = True  # type: ignore[method-assign, assignment]

    def disable(self) -> None:
        self.enable = False  # type: ignore[method-assign, assignment]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        sys.stdout.write(f"{batch_idx + 1} of {trainer.num_training_batches} \r")
        sys.stdout.flush()


@pytest.mark.parametrize("bar_first", [False, True])
def test_a_bar_of_ones_own(bar_first: bool, run: Run) -> None:
    seen = run.see(bar=Percent(), bar_first=bar_first)
    frames = first_seen(seen, STAGES)
    assert frames == sorted(frames)
    assert seen.text.endswith("1 of 2 \r2 of 2 \r")  # nothing is wiped
    assert seen.screen == ["2 of 2"]


def test_silent_without_a_progress_bar(run: Run) -> None:
    assert run.see(enable_progress_bar=False).text == ""


def test_a_line_for_each_stage_in_a_file(run: Run) -> None:
    lines = run.see(bar=Percent(), tty=False).text.split("\n")
    assert lines[:-1] == [
        "lightning_rft: starting 1 explorer (HeldEngine)",
        "lightning_rft: loading the model",
        "lightning_rft: waiting for explorers",
        "lightning_rft: pushing weights (version 0)",
        "lightning_rft: exploring batch 0",
        "lightning_rft: training on batch 0",
        "lightning_rft: pushing weights (version 1)",
    ]
    assert lines[-1] == "1 of 2 \r2 of 2 \r"


def test_a_line_for_each_stage_around_the_bar_in_a_file(run: Run) -> None:
    seen = run.see(bar=TQDMProgressBar(), tty=False)
    assert [line for line in seen.screen if "lightning_rft" in line] == [
        "lightning_rft: starting 1 explorer (HeldEngine)",
        "lightning_rft: loading the model",
        "lightning_rft: waiting for explorers",
        "lightning_rft: pushing weights (version 0)",
        "lightning_rft: exploring batch 0",
        "lightning_rft: training on batch 0",
        "lightning_rft: pushing weights (version 1)",
    ]
    assert seen.screen[7].startswith("Epoch 0: 100%|")


@pytest.mark.parametrize(("call", "stage"), [("validate", "exploring validation"), ("predict", "exploring batch 0")])
def test_other_calls(call: str, stage: str, run: Run) -> None:
    seen = run.see(call, bar=TQDMProgressBar())
    frames = first_seen(seen, [*STAGES[:4], stage])
    assert frames == sorted(frames)
    assert any("100%|" in line for line in seen.screen)
    assert not any(ours(line) for line in seen.screen)


# However a wait ends


def test_an_error_begins_on_a_clean_line(run: Run) -> None:
    class Unhappy(Exception):
        pass

    def reward(completion: str, task: rft.Task) -> float:
        raise Unhappy

    with pytest.raises(Unhappy):
        run.see(bar=Percent(), reward=reward)
    assert any("Exploring batch 0" in line for frame in run.recording.frames for line in frame)
    assert rests(run.recording.screen) == []


@pytest.fixture
def can_interrupt() -> Iterator[None]:
    """Lightning ignores Ctrl+C from the first on, for all that runs in the process afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_a_clean_line(run: Run, can_interrupt: None) -> None:
    with pytest.raises(SystemExit):
        run.see(when={"aiting for explorers": lambda recording: _thread.interrupt_main()})
    assert rests(run.recording.screen) == []


def test_what_others_print_stays_whole(run: Run) -> None:
    warning = "UserWarning: something that a library has to say, while it is waited for something else"

    def warn(recording: Recording) -> None:
        recording.stream.write(warning + "\n")
        recording.stream.flush()

    seen = run.see(
        bar=Percent(),
        when={"Waiting for explorers: 0 of 1 ready ...": warn, "explorers: 0 of 1 ready (1 s)": run.touch("waiting")},
    )
    assert seen.screen == [warning, "2 of 2"]


def test_a_narrow_terminal(run: Run) -> None:
    seen = run.see(bar=Percent(), columns=24)
    assert max(len(frame) for frame in seen.frames) == 1
    assert ["Waiting for explorers:"] in seen.frames
