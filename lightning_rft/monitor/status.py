"""The terminal line that shows what a run is doing before its progress bar moves."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from tqdm import tqdm

__all__ = ["StatusLine"]


class StatusLine:
    """Shows what the trainer waits for; as a context manager, it leaves the terminal clean. Not thread-safe.

    In a terminal the line is rewritten in place, within a TQDM or Rich bar if there is one. Elsewhere (a file, a
    notebook) each stage is a line of its own. It is silent if the trainer is None or has no progress bar.
    """

    def __init__(self, trainer: L.Trainer | None) -> None:
        #: Whether to be silent in a terminal without a bar, for stages during which others may write.
        self.bar_only = False
        self._trainer = trainer if trainer is not None and trainer.is_global_zero else None
        self._place: _Place | None = None
        self._printed = ""
        self._shown: _Stage | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()

    def say(self, stage: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        """Shows a stage in place of the last one, and in a terminal how much of ``total`` is done."""
        callback = None if self._trainer is None else self._trainer.progress_bar_callback
        if callback is None or not getattr(callback, "is_enabled", True):
            return
        if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
            if stage != self._printed:
                self._printed = stage
                tqdm.write(f"lightning_rft: {stage}")  # above a bar, if there is one
                sys.stdout.flush()
            return
        now = _Stage(stage, done, total, unit, int(time.monotonic() - self._began))
        if now == self._shown:
            return
        self._shown = now
        if self._place is None:
            self._place = _place(callback, self.bar_only)
        if self._place is not None:
            self._place.show(now)

    def clear(self) -> None:
        """Removes the text, if any is shown."""
        place, self._place, self._shown = self._place, None, None
        if place is not None:
            place.clear()


@dataclass(frozen=True)
class _Stage:
    name: str
    done: int
    total: int
    unit: str
    seconds: int

    def __str__(self) -> str:
        return f"{self.name}: {self.done} of {self.total} {self.unit}" if self.total else self.name


def _place(callback: ProgressBar, bar_only: bool) -> _Place | None:
    if isinstance(callback, TQDMProgressBar):
        for bar in vars(callback).values():
            if isinstance(bar, tqdm) and not bar.disable:
                return _InTqdm(bar)
    if isinstance(callback, RichProgressBar) and callback.progress is not None and callback.progress.live.is_started:
        return _InRich(callback)
    return None if bar_only else _OwnLine()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


class _Place(Protocol):
    """A place where a stage can be shown and removed again."""

    def show(self, stage: _Stage) -> None: ...

    def clear(self) -> None: ...


class _OwnLine:
    """The cursor's line; the cursor waits at its beginning, so that a warning is not appended to our text."""

    def show(self, stage: _Stage) -> None:
        line = _capital(str(stage)) + (f" ({stage.seconds} s)" if stage.seconds else " ...")
        self._write(line[: (os.get_terminal_size(sys.stdout.fileno()).columns or 80) - 1] + "\r")

    def clear(self) -> None:
        self._write("")

    def _write(self, text: str) -> None:
        sys.stdout.write("\r\x1b[K" + text)
        sys.stdout.flush()


class _InTqdm:
    """The end of a TQDM bar, where Lightning shows metrics."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._before = self._shown = ""

    def show(self, stage: _Stage) -> None:
        if self._bar.postfix != self._shown:  # it is Lightning's
            self._before = self._bar.postfix or ""
        self._shown = str(stage)
        self._bar.set_postfix_str(self._shown)

    def clear(self) -> None:
        if self._bar.postfix == self._shown:
            self._bar.set_postfix_str(self._before)


class _InRich:
    """A row of its own among Rich's bars."""

    def __init__(self, callback: RichProgressBar) -> None:
        self._callback = callback
        assert callback.progress is not None
        self._progress = callback.progress
        self._row = self._progress.add_task("", visible=False)

    def show(self, stage: _Stage) -> None:
        self._progress.update(
            self._row,
            description=_capital(stage.name),
            completed=stage.done,
            total=stage.total or float("inf"),
            visible=True,
        )
        self._callback.refresh(hard=True)

    def clear(self) -> None:
        self._progress.update(self._row, visible=False)  # a row that is removed would shift Lightning's
        self._callback.refresh(hard=True)
