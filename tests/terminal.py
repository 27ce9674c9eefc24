"""A terminal that remembers what was on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import threading
from pathlib import Path
from types import TracebackType
from typing import TextIO

_CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b\[[?0-9;]*$|\x1b$")


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


class Terminal:
    """A pseudo-terminal; ``stream`` writes to it, and ``frames`` are the screens that were seen."""

    def __init__(self, columns: int = 100) -> None:
        self.frames: list[list[str]] = []
        self.text = ""
        self._screen = Screen(columns)
        self._ours, theirs = pty.openpty()
        attributes = termios.tcgetattr(theirs)
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.stream: TextIO = os.fdopen(theirs, "w", encoding="utf-8")
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Terminal:
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
        return self.frames[-1] if self.frames else []

    def save(self, path: Path) -> None:
        path.write_text("\n\n".join("\n".join(frame) for frame in self.frames))

    def _read(self) -> None:
        while select.select([self._ours], [], []):
            try:
                text = os.read(self._ours, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                return
            self.text += text
            self._screen.feed(text)
            if not self.frames or self.frames[-1] != self._screen.lines:
                self.frames.append(self._screen.lines)
