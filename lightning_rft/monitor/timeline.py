"""A callback that writes what every process did when, as a trace and as a picture."""

from __future__ import annotations

import importlib.util
import json
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.monitor.drawing import draw
from lightning_rft.monitor.spans import Span
from lightning_rft.monitor.trace import trace

__all__ = ["TimelineCallback"]

_log = logging.getLogger(__name__)


class TimelineCallback(Callback):
    """Writes what explorers, buffer and trainer did, and what they waited for, at the end of ``fit``.

    ``timeline.json`` has all spans in Chrome's trace event format: open it at https://ui.perfetto.dev.
    ``timeline.png`` shows the last few batches. Both are also written if ``fit`` ends with an exception, and replaced
    by a later ``fit`` into the same folder. In a notebook the callback, as a cell's last line, shows the picture.

    Args:
        dirpath: Folder to write to; left out, ``rft/`` in the trainer's log folder.
        max_spans: Maximum spans to keep, about 200 bytes each; the oldest are dropped.
        png_batches: Batches in the picture, counted back from the last one trained.

    Raises:
        ConfigurationError: ``max_spans`` or ``png_batches`` is below 1, or there is no ``RFTDataModule`` to record.

    Example::

        trainer = L.Trainer(max_steps=100, callbacks=[Synchronous(), TimelineCallback()])
    """

    def __init__(self, dirpath: str | Path | None = None, max_spans: int = 100_000, png_batches: int = 8) -> None:
        for setting, value in {"max_spans": max_spans, "png_batches": png_batches}.items():
            if value < 1:
                raise ConfigurationError(f"{setting}={value} must be at least 1")
        self.dirpath = dirpath
        self.png_batches = png_batches
        self._spans: deque[Span] = deque(maxlen=max_spans)
        self._recorded = 0
        self._lock = threading.Lock()
        self._observers: list[Callable[[Span], None]] | None = None  # the list that record is in, until all is written
        self._hooks: list[Any] = []
        self._folder = Path()
        self._title = ""
        self._began: float | None = None
        self._stepped: float | None = None

    def record(self, span: Span) -> None:
        """Records a span, from any thread."""
        with self._lock:
            self._recorded += 1
            self._spans.append(span)

    @property
    def spans(self) -> list[Span]:
        """The spans recorded since ``fit`` began, in the order in which they came, but for those dropped."""
        with self._lock:
            return list(self._spans)

    def _repr_png_(self) -> bytes | None:  # what a notebook shows of it
        picture = self._folder / "timeline.png"
        return picture.read_bytes() if self._recorded and picture.is_file() else None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "observers"):
            raise ConfigurationError(
                "TimelineCallback needs an RFTDataModule: call trainer.fit(module, datamodule=RFTDataModule(...))"
            )
        log_dir = trainer.log_dir  # a collective: every rank asks
        if not trainer.is_global_zero:
            return
        folder = Path(log_dir or trainer.default_root_dir) / "rft"
        self._folder = folder if self.dirpath is None else Path(self.dirpath)
        strategies = [callback for callback in trainer.callbacks if hasattr(callback, "pushes_after")]  # type: ignore[attr-defined]
        self._title = " ".join(type(strategy).__name__ for strategy in strategies)
        with self._lock:
            self._recorded = 0
            self._spans.clear()
        self._began = None
        self._observers = datamodule.observers
        if self.record not in datamodule.observers:
            datamodule.observers.append(self.record)
        if not _can_draw():  # warn now, when it can still be installed
            warnings.warn(
                "matplotlib is not installed, so TimelineCallback will write timeline.json but no timeline.png: "
                "pip install 'lightning-rft[timeline]'",
                stacklevel=2,
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Training ends with the optimizer's step: until our on_train_batch_end, other callbacks may have pushed weights
        if self._observers is not None:
            for optimizer in trainer.optimizers:
                if isinstance(optimizer, torch.optim.Optimizer):
                    self._hooks.append(optimizer.register_step_post_hook(self._on_step))

    def _on_step(self, *_: Any) -> None:
        if torch.cuda.is_initialized():
            # The step is only queued. Only this thread's stream is waited for: others may be sending weights.
            torch.cuda.current_stream().synchronize()
        self._stepped = time.monotonic()

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._observers is not None and self._began is None:
            self._began, self._stepped = time.monotonic(), None

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._began is not None and batch.last:
            end = time.monotonic() if self._stepped is None else self._stepped  # a skipped step calls no hook
            self.record(Span("trainer", "train", self._began, end, batch=batch.batch, version=batch.batch))
            self._began = None

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._finish()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._finish()

    def _finish(self) -> None:
        observers, self._observers = self._observers, None
        if observers is None:
            return
        if self.record in observers:
            observers.remove(self.record)
        while self._hooks:
            self._hooks.pop().remove()
        try:
            self._write()
        except Exception:  # must hide neither a good run nor the error that ended a bad one
            _log.exception("the timeline could not be written to %s", self._folder)

    def _write(self) -> None:
        spans = self.spans
        dropped = self._recorded - len(spans)
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / "timeline.json", "w", encoding="utf-8") as file:
            json.dump(trace(spans, title=self._title, dropped=dropped), file, separators=(",", ":"))
        if spans and _can_draw():
            path = self._folder / "timeline.png"
            draw(spans, path, title=self._title, batches=self.png_batches, dropped=dropped)


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
