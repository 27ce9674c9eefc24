"""The end of a log: the same as of the whole text, at no more cost for a long one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.explorer import log_tail as module
from lightning_rft.explorer.log_tail import log_tail


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n", "one", "one\n", "one\r\ntwo\r\n", "ä" * 30 + "\nlast", "\n" * 50),
        "".join(f"line {number}\n" for number in range(30)),
    ],
)
def test_it_is_the_end_of_the_whole(text: str, tmp_path: Path) -> None:
    path = tmp_path / "explorer-0.log"
    path.write_bytes(text.encode())
    assert log_tail(path) == "\n".join(text.splitlines()[-20:])


def test_a_long_log_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "explorer-0.log", []
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(200_000)) + b"half a charact\xc3")

    class Counts(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            found: Any = super().read(-1 if size is None else size)
            read.append(len(found))
            return bytes(found)

    monkeypatch.setattr(module, "open", Counts, raising=False)
    lines = log_tail(path).splitlines()
    assert lines[:-1] == [f"line {number}" for number in range(199_981, 200_000)]
    assert lines[-1] == "half a charact\N{REPLACEMENT CHARACTER}"
    assert read == [1 << 16]


def test_of_a_line_without_end_the_end_is_told(tmp_path: Path) -> None:
    path = tmp_path / "explorer-0.log"
    path.write_bytes(b"x" * 10**6 + "é".encode() * 3)
    assert log_tail(path) == "x" * ((1 << 16) - 6) + "ééé"
