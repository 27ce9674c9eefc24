"""An engine of tests to which weights go by CUDA IPC, in a module that an explorer imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lightning_rft as rft
from tests.sync.ipc_on_cpu import IPC


class OnGPU(rft.TransformersEngine):
    """Says that its weights are on a GPU, of which all that a push needs is in place."""

    def __init__(self, folder: Path) -> None:
        super().__init__(dtype="float32", device="cpu")
        self.folder = folder

    def start(self, *arguments: Any, **settings: Any) -> None:
        super().start(*arguments, **settings)
        IPC.put_in_place(pytest.MonkeyPatch(), "explorer", self.folder, [0])  # for as long as this process lives
        self.ipc = True
