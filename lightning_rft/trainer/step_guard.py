"""The guard that keeps what is not finite away from the optimizer."""

from __future__ import annotations

import math
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_rft.errors import NonFiniteError

__all__ = ["StepGuard"]

_IN_A_ROW = 5  # by then it is no single bad batch


class StepGuard:
    """Judges each batch by its loss and its gradient's norm, which are the same on all ranks."""

    def __init__(self) -> None:
        #: Batches of this run that were not stepped.
        self.skipped = 0
        self._in_a_row = 0
        self._batch, self._loss = 0, 0.0

    def trained(self, batch: int, loss: float) -> None:
        """Takes in a batch and its loss."""
        self._batch, self._loss = batch, loss

    def refuses(self, norm: float, scaler: Any = None) -> bool:
        """Whether the step of the batch must be skipped, given the norm of its gradient.

        An overflow of scaled gradients is no fault as long as ``scaler``, that of 16-mixed, can lower its scale.

        Raises:
            NonFiniteError: So had those of some batches before.
        """
        values = {"loss": self._loss, "norm of the gradient": norm}
        found = " and ".join(f"the {name}" for name, value in values.items() if not math.isfinite(value))
        if not found:
            self._in_a_row = 0
            return False
        self.skipped += 1
        rank_zero_info(f"The optimizer skips batch {self._batch}, because {found} is not finite.")
        if scaler is not None and math.isfinite(self._loss) and scaler.get_scale() > 1:
            return True
        self._in_a_row += 1
        if self._in_a_row == _IN_A_ROW:
            raise NonFiniteError(
                f"{_IN_A_ROW} batches in a row, up to batch {self._batch}, were not trained on, because {found} was "
                "not finite: look at rft/reward and rft/kl of the batches before, lower the learning rate, set "
                "Trainer(gradient_clip_val=1.0), or use more precision"
            )
        return True
