"""The timeline: what is recorded, the trace, the picture, and the callback under a real trainer."""

from __future__ import annotations

import json
import runpy
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_rft.errors import ConfigurationError
from lightning_rft.monitor import drawing, timeline
from lightning_rft.monitor.drawing import draw
from lightning_rft.monitor.layout import layout
from lightning_rft.monitor.spans import Span
from lightning_rft.monitor.timeline import TimelineCallback
from lightning_rft.monitor.trace import trace
from lightning_rft.trainer.loader import BatchPart
from tests.monitor.drawn_timelines import STORIES
from tests.trainer_and_data import quiet_trainer

# Recording and summing up


def test_spans_come_from_many_threads_at_once() -> None:
    callback = TimelineCallback()
    barrier = threading.Barrier(4)

    def work(track: str) -> None:
        barrier.wait()
        for batch in range(500):
            callback.record(Span(track, "rollout", batch, batch + 1.0, batch=batch))

    threads = [threading.Thread(target=work, args=(f"explorer {index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracks = Counter(span.track for span in callback.spans)
    assert tracks == {f"explorer {index}": 500 for index in range(4)}
    for track in tracks:
        assert [span.batch for span in callback.spans if span.track == track] == list(range(500))


@pytest.mark.parametrize("settings", [{"max_spans": 0}, {"png_batches": 0}])
def test_settings_that_keep_nothing_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        TimelineCallback(**settings)


# The trace


@pytest.mark.parametrize("name", STORIES)
def test_a_trace_is_what_viewers_accept(name: str) -> None:
    spans = STORIES[name]().spans
    written = json.loads(json.dumps(trace(spans, title=name, dropped=3)))
    assert written["otherData"] == {"strategy": name, "began_monotonic_s": 0.0, "dropped_spans": 3}
    names = [event for event in written["traceEvents"] if event["ph"] == "M"]
    slices = [event for event in written["traceEvents"] if event["ph"] == "X"]
    assert written["traceEvents"] == names + slices and len(slices) == len(spans)
    assert all(type(event[field]) is int for event in slices for field in ("ts", "dur", "pid", "tid"))
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in slices)
    assert slices == sorted(slices, key=lambda event: event["ts"])
    # every process and thread has a name, once; slices of a thread do not overlap
    processes = {event["pid"]: event["args"]["name"] for event in names if event["name"] == "process_name"}
    explorers = [f"explorer {index}" for index in range(1 + ("Multi" in name))]
    assert [processes[pid] for pid in sorted(processes)] == [*explorers, "buffer", "trainer"]
    threads = [event["tid"] for event in names if event["name"] == "thread_name"]
    assert len(threads) == len(set(threads)) and set(threads) == {event["tid"] for event in slices}
    for tid in threads:
        mine = [event for event in slices if event["tid"] == tid]
        assert all(one["ts"] + one["dur"] <= other["ts"] for one, other in pairwise(mine))


def test_a_slice_says_what_it_is_about() -> None:
    spans = [
        Span("trainer", "train", 10.0, 10.5, batch=3, version=3),
        Span("trainer", "sync", 10.5, 10.500002, version=4),
        Span("trainer", "wait", 11.0, 10.9, detail="experience"),  # no clock is that wrong, but no viewer bears it
    ]
    slices = [event for event in trace(spans)["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"], event["args"]) for event in slices] == [
        ("train 3", 0, 500_000, {"batch": 3, "version": 3}),
        ("sync v4", 500_000, 2, {"version": 4}),
        ("wait for experience", 1_000_000, 0, {"for": "experience"}),
    ]
    assert trace([])["traceEvents"] == []


# The layout of the picture


def rollout(batch: int, begin: float, end: float) -> Span:
    return Span("explorer 0", "rollout", begin, end, batch=batch)


def test_groups_of_a_batch_are_one_block_and_batches_at_once_lie_above_each_other() -> None:
    blocks = layout([rollout(0, 0, 3), rollout(0, 1, 4), rollout(1, 3.5, 6), rollout(2, 6, 8), rollout(2, 9, 10)], 0.1)
    assert [(block.labels, block.begin, block.end, block.low, block.high) for block in blocks] == [
        (("R0",), 0, 4, 0.5, 1.0),
        (("R1",), 3.5, 6, 0.0, 0.5),
        (("R2",), 6, 8, 0.0, 1.0),
        (("R2",), 9, 10, 0.0, 1.0),
    ]


def test_more_batches_at_once_than_lanes_share_the_last_lane() -> None:
    blocks = layout([rollout(batch, 0.1 * batch, 10) for batch in range(12)], 0.0)
    assert [block.labels[0] for block in blocks] == ["R0", "R1", "R2", "R3–11"]
    assert blocks[-1].begin == pytest.approx(0.3) and blocks[-1].low == 0


def test_weights_interrupt_a_rollout_and_waiting_shows_only_where_nothing_is_done() -> None:
    wait = Span("explorer 0", "wait", 0, 9, detail="weights")
    load = Span("explorer 0", "load checkpoint", 3, 4, version=2)
    blocks = {block.labels[0]: block for block in layout([wait, rollout(0, 1, 6), load], 0.1)}
    assert blocks["R0"].visible == ((1, 3), (4, 6))
    assert blocks["wait for weights"].visible == ((0, 1), (6, 9))
    assert blocks["c v2"].visible is None


def test_what_is_written_while_training_goes_on_has_a_strip_of_its_own() -> None:
    train = Span("trainer", "train", 0, 4, batch=0)
    wait = Span("trainer", "wait", 4, 6, detail="experience")
    for begin, beside in ((3.0, True), (4.0, False)):
        write = Span("trainer", "write checkpoint", begin, 5, version=1)
        blocks = {block.kind: block for block in layout([train, wait, write], 0.1)}
        assert (blocks["train"].low > blocks["checkpoint"].high) == beside
        assert blocks["wait"].visible == (((4, 6),) if beside else ((5, 6),))


# The picture


class WatchedCanvas(drawing._Canvas):
    last: drawing._Canvas

    def __init__(self, height: float) -> None:
        super().__init__(height)
        WatchedCanvas.last = self


def colours(path: Path) -> set[str]:
    """The kinds whose colours fill something, but for the legend."""
    image = pytest.importorskip("matplotlib.image").imread(path)[: -int(0.5 * drawing._DPI), :, :3]
    pixels = (image * 255).round().astype("uint8")
    fills = {kind: list(bytes.fromhex(fill[1:])) for kind, (fill, *_) in drawing.KINDS.items()}
    return {kind for kind, fill in fills.items() if (pixels == fill).all(axis=2).sum() > 500}


def assert_texts_apart(canvas: drawing._Canvas) -> None:
    boxes = [(text.get_text(), text.get_window_extent(canvas.renderer)) for text in canvas.axes.texts]
    page = canvas.figure.bbox
    for index, (text, box) in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
        for other, box_of_other in boxes[:index]:
            assert not box.overlaps(box_of_other), (text, other)


@pytest.mark.parametrize("name", STORIES)
def test_the_four_pictures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(drawing, "_Canvas", WatchedCanvas)
    draw(STORIES[name]().spans, tmp_path / "timeline.png", title=name)
    asynchronous, never_waits = "Asynchronous" in name, "Multi" in name
    expected = {"rollout", "buffer", "train", "wait", "checkpoint" if asynchronous else "sync"}
    assert colours(tmp_path / "timeline.png") == expected - ({"wait"} if never_waits else set())
    texts = {text.get_text() for text in WatchedCanvas.last.axes.texts}
    assert {name, "Explorer 0", "Buffer", "Trainer", "T5"} <= texts
    assert ("R11" if asynchronous else "R5") in texts
    assert ("R0" in texts) == (not asynchronous)  # long ago
    assert_texts_apart(WatchedCanvas.last)


def test_a_crowded_picture_stays_legible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(drawing, "_Canvas", WatchedCanvas)
    spans = STORIES["MultiExplorerAsynchronous"]().spans
    spans += [
        Span(f"explorer {index}", "rollout", 0.1 * batch, 20, batch=batch) for index in range(12) for batch in range(9)
    ]
    draw(spans, tmp_path / "timeline.png", title="MultiExplorerAsynchronous", batches=100, dropped=123_456)
    assert_texts_apart(WatchedCanvas.last)
    texts = [text.get_text() for text in WatchedCanvas.last.axes.texts]
    assert "12 batches · the 123456 oldest spans were dropped" in texts
    assert [text for text in texts if text.startswith("Explorer")] == [f"Explorer {index}" for index in range(12)]


def test_a_picture_of_almost_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw([Span("trainer", "wait", 3.0, 3.0, detail="experience")], tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 1000


def test_the_picture_needs_neither_pyplot_nor_the_style_of_the_user(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    spans = STORIES["Synchronous"]().spans
    draw(spans, tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 20, "hatch.linewidth": 9}):
        draw(spans, tmp_path / "styled.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


@pytest.mark.parametrize("module", [drawing, timeline])
def test_matplotlib_is_imported_only_to_draw(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it would raise
    assert runpy.run_path(module.__file__)


# The callback


class Batches(L.LightningDataModule):
    """Four batches of two micro-batches, and whoever wants to know of them."""

    def __init__(self) -> None:
        super().__init__()
        self.observers: list[Callable[[Span], None]] = []

    def train_dataloader(self) -> Any:
        return _Loader(self)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch


class _Loader:
    def __init__(self, data: Batches) -> None:
        self.data = data

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[BatchPart]:
        for item in range(8):
            if item % 2 == 0:
                began = time.monotonic()
                span = Span("trainer", "wait", began, time.monotonic(), detail="experience")
                for observer in self.data.observers:
                    observer(span)
            yield BatchPart(item // 2, [], part=item % 2, parts=2)


class Module(L.LightningModule):
    fails_at = -1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def training_step(self, batch: BatchPart, batch_idx: int) -> torch.Tensor:
        if batch.batch == self.fails_at:
            raise OSError("the step failed")
        time.sleep(0.005)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SlowPush(Callback):
    """Stands for a strategy: after every batch it blocks for longer than the batch takes."""

    def pushes_after(self, batch: int) -> bool:
        return True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.last:
            time.sleep(0.1)


def fit(folder: Path, *callbacks: Callback, data: Any = None, fails_at: int = -1, **settings: Any) -> Batches:
    data = data or Batches()
    trainer = quiet_trainer(folder, *callbacks, **{"max_epochs": 1, "accumulate_grad_batches": 2} | settings)
    module = Module()
    module.fails_at = fails_at
    trainer.fit(module, data)
    return data


def read(folder: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((folder / "timeline.json").read_text())
    return written


def names(folder: Path) -> list[str]:
    return [event["name"] for event in read(folder)["traceEvents"] if event["ph"] == "X"]


@pytest.mark.parametrize("first", [True, False])
def test_fit_is_recorded_whatever_the_order_of_callbacks(first: bool, tmp_path: Path) -> None:
    callback = TimelineCallback()
    data = fit(tmp_path, *([callback, SlowPush()] if first else [SlowPush(), callback]))
    assert data.observers == []
    trains = [span for span in callback.spans if span.what == "train"]
    assert [(span.track, span.batch, span.version) for span in trains] == [("trainer", b, b) for b in range(4)]
    assert all(0.01 <= span.end - span.begin < 0.1 for span in trains)  # two micro-batches, and no push
    assert all(other.begin - one.end >= 0.1 for one, other in pairwise(trains))
    assert Counter(names(tmp_path / "rft")) == {"wait for experience": 4} | {f"train {b}": 1 for b in range(4)}
    assert read(tmp_path / "rft")["otherData"]["strategy"] == "SlowPush"
    assert (tmp_path / "rft" / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_files_go_to_the_log_folder_or_where_they_are_told(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    fit(tmp_path, TimelineCallback(), logger=logger, log_every_n_steps=1)
    assert names(Path(logger.log_dir) / "rft")
    fit(tmp_path, TimelineCallback(tmp_path / "there" / "it"), logger=False)
    assert names(tmp_path / "there" / "it")
    assert not (tmp_path / "rft").exists()


def test_the_oldest_spans_are_dropped_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(drawing, "_Canvas", WatchedCanvas)
    fit(tmp_path, TimelineCallback(max_spans=5))
    assert names(tmp_path / "rft")[-1] == "train 3" and len(names(tmp_path / "rft")) == 5
    assert read(tmp_path / "rft")["otherData"]["dropped_spans"] == 3
    assert "the 3 oldest spans were dropped" in " ".join(text.get_text() for text in WatchedCanvas.last.axes.texts)


def test_a_run_that_fails_is_written_once_and_keeps_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(timeline, "draw", lambda spans, path, **_: written.append(len(spans)))
    callback, data = TimelineCallback(), Batches()
    with pytest.raises(OSError, match="the step failed"):
        fit(tmp_path, callback, data=data, fails_at=2)
    assert data.observers == []
    callback.teardown(L.Trainer.__new__(L.Trainer), Module(), "fit")
    assert names(tmp_path / "rft").count("train 1") == 1 and "train 2" not in names(tmp_path / "rft")
    assert written == [len(callback.spans)]


@pytest.mark.parametrize("fails_at", [2, -1])
def test_an_error_while_writing_is_only_logged(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(timeline, "trace", full)
    if fails_at < 0:
        fit(tmp_path, TimelineCallback())
    else:
        with pytest.raises(OSError, match="the step failed"):
            fit(tmp_path, TimelineCallback(), fails_at=fails_at)
    assert "the disk is full" in caplog.text


def test_a_second_fit_begins_anew_and_validation_is_not_recorded(tmp_path: Path) -> None:
    callback, data = TimelineCallback(), Batches()
    fit(tmp_path, callback, data=data)
    fit(tmp_path, callback, data=data)
    assert Counter(names(tmp_path / "rft"))["train 3"] == 1
    callback.setup(L.Trainer.__new__(L.Trainer), Module(), "validate")
    assert data.observers == []


def test_without_matplotlib_there_is_a_trace_and_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, TimelineCallback())
    messages = [str(warning.message) for warning in caught if "matplotlib" in str(warning.message)]
    assert len(messages) == 1 and "pip install 'lightning-rft[timeline]'" in messages[0]
    assert names(tmp_path / "rft") and not (tmp_path / "rft" / "timeline.png").exists()


def test_there_must_be_something_to_observe(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="RFTDataModule"):
        fit(tmp_path, TimelineCallback(), data=L.LightningDataModule())
