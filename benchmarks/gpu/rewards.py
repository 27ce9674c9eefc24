"""The reward of the fits; in a file of its own, since explorers import it."""

from __future__ import annotations

from typing import Any

__all__ = ["restless"]


def restless(completion: str, task: Any) -> float:
    """A reward that differs within every group, so that every step trains."""
    return float(sum(map(ord, completion)) % 101)
