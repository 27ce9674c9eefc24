"""An engine that writes down what it is told, in a module that an explorer imports quickly."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from lightning_rft.explorer.engines.sleeping import PARTS
from tests.processes import LightEngine


class Noting(LightEngine):
    """Writes down what it is told, in the file in which the trainer writes what it does."""

    def __init__(self, path: Path) -> None:
        super().__init__(mean_tokens=4)
        self.path = path

    def add(self, request: Any) -> None:
        super().add(request)
        note(self.path, "explore")

    def load(self, manifest: Any, version: int) -> None:
        super().load(manifest, version)
        note(self.path, f"load {version}")

    def sleep(self, level: int) -> None:
        super().sleep(level)
        note(self.path, f"sleep {level}")

    def wake(self, parts: Any = PARTS) -> list[str]:
        woken = super().wake(parts)
        if woken:
            note(self.path, f"wake {'+'.join(woken)}")
        return woken


def note(path: Path, what: str) -> None:
    """Adds a line."""
    with path.open("a") as file:
        file.write(what + "\n")


def noted(path: Path) -> list[str]:
    """What happened, each in a row of the same once."""
    return [what for what, _ in groupby(path.read_text().splitlines())]
