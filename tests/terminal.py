"""A terminal that remembers what was on its screen, and an engine that waits until it is seen to be waited for."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tests.processes import LightEngine, until

_CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b\[[?0-9;]*$|\x1b$")
_REDRAWN = re.compile(r"(?=\r(?!\n))")  # whatever rewrites a line or lines begins by returning to its beginning


class Screen:
    """What one sees after some bytes: knows what TQDM, Rich and we use, and fails on anything else."""

    def __init__(self, columns: int = 100) -> None:
        self._columns = columns
        self._rows: list[list[str]] = [[]]
        self._row = self._column = 0
        self._rest = ""

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        at = 0
        while at < len(text):
            if text[at] == "\x1b":
                control = _CONTROL.match(text, at)
                assert control, repr(text[at : at + 10])
                if control[2] is None:
                    self._rest = text[at:]
                    return
                self._control(control[1], control[2])
                at = control.end()
            else:
                self._put(text[at])
                at += 1

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self._rows]

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._row += 1
        else:
            if self._column == self._columns:
                self._row, self._column = self._row + 1, 0
            self._reach()
            row = self._rows[self._row]
            row.extend(" " * (self._column + 1 - len(row)))
            row[self._column] = character
            self._column += 1
        self._reach()

    def _reach(self) -> None:
        while len(self._rows) <= self._row:
            self._rows.append([])

    def _control(self, argument: str, letter: str) -> None:
        if letter == "K":
            assert argument in ("", "0", "2"), argument
            del self._rows[self._row][0 if argument == "2" else self._column :]
        elif letter in "AB":
            self._row = max(0, self._row + int(argument or 1) * (1 if letter == "B" else -1))
            self._reach()
        else:
            assert letter in "mhl", letter  # colour, and whether the cursor is shown


class Recording:
    """A stream whose other end is a terminal, or a pipe; ``frames`` are the screens that were seen.

    Args:
        columns: Width of the terminal.
        tty: Whether it is a terminal.
        when: What to do, once, when a text is on the screen; called on another thread.
    """

    def __init__(
        self, columns: int = 100, *, tty: bool = True, when: dict[str, Callable[[Recording], object]] | None = None
    ) -> None:
        self.frames: list[list[str]] = []
        self.text = ""
        self._tty = tty
        self._when = dict(when or {})
        self._screen = Screen(columns)
        self._ours, theirs = pty.openpty() if tty else os.pipe()
        if tty:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.stream: TextIO = os.fdopen(theirs, "w", encoding="utf-8")
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Recording:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stream.close()
        self._thread.join()
        os.close(self._ours)

    @property
    def screen(self) -> list[str]:
        """The last of the frames."""
        return self.frames[-1]

    def _read(self) -> None:
        decode = codecs.getincrementaldecoder("utf-8")().decode
        while True:
            try:
                received = os.read(self._ours, 65536)
            except OSError:  # the terminal is closed
                return
            if not received:  # the pipe is
                return
            text = decode(received)
            self.text += text
            for part in _REDRAWN.split(text):  # this thread may come late, to much that was shown in turn
                self._screen.feed(part if self._tty else part.replace("\n", "\r\n"))
                if not self.frames or self.frames[-1] != self._screen.lines:
                    self.frames.append(self._screen.lines)
                for expected in [text for text in self._when if any(text in line for line in self.screen)]:
                    self._when.pop(expected)(self)


class HeldEngine(LightEngine):
    """Starts once ``waiting`` exists in a folder, and answers once ``exploring`` does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(mean_tokens=4)
        self.folder = folder

    def start(self, model: str, *, max_model_len: int, seed: int) -> None:
        until(lambda: (self.folder / "waiting").exists(), "waiting")
        super().start(model, max_model_len=max_model_len, seed=seed)

    def step(self) -> Any:
        until(lambda: (self.folder / "exploring").exists(), "exploring")
        return super().step()
