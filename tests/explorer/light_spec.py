"""What explorers run whose engine computes nothing, for tests of how they come and go."""

from __future__ import annotations

from pathlib import Path

from lightning_rft.explorer.spec import ExplorerSpec
from lightning_rft.explorer.workflows.single_turn import SingleTurn
from lightning_rft.model_folder import Pretrained
from lightning_rft.settings import Timeouts, Tolerance
from tests.processes import LightEngine

__all__ = ["light_spec"]


def light_spec(model: Path, *, start_s: float) -> ExplorerSpec:
    """One that is up within ``start_s``."""
    return ExplorerSpec(
        engine=LightEngine(),
        model=Pretrained(str(model)),
        workflow=SingleTurn(),
        reward=lambda completion, task: 1.0,
        max_model_len=50,
        seed=0,
        tolerance=Tolerance(retries=0),
        timeouts=Timeouts(start_s=start_s),
    )
