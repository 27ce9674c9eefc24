"""How much of the weights a push changes."""

from __future__ import annotations

import torch

from lightning_rft.sync.transports.transport import Weights

__all__ = ["Changes"]

_SAMPLED_ELEMENTS = 100_000


class Changes:
    """The share of elements that differ from the push before, in the engines' dtype; 1 at first.

    Small updates vanish in bfloat16: a share near 0 says that explorers see the same policy as before.
    """

    def __init__(self) -> None:
        self._before: torch.Tensor | None = None

    def since_last(self, weights: Weights, dtype: str) -> float:
        """Compares about a hundred thousand evenly spaced elements, and keeps them for the next time.

        Example:
            >>> changes, weights = Changes(), torch.ones(1000)
            >>> changes.since_last([("w", weights)], "bfloat16")
            1.0
            >>> weights[:10], weights[10:] = 2.0, 1.0001
            >>> round(changes.since_last([("w", weights)], "bfloat16"), 3)
            0.01
        """
        total = sum(tensor.numel() for _, tensor in weights)
        stride = max(1, total // _SAMPLED_ELEMENTS)
        target: torch.dtype = getattr(torch, dtype)
        now = torch.cat([tensor.detach().reshape(-1)[::stride].to("cpu", target) for _, tensor in weights])
        before, self._before = self._before, now
        if before is None or before.shape != now.shape or before.dtype != now.dtype:
            return 1.0
        return float((before != now).float().mean())
