"""What this machine is good at, for defaults only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_rft.errors import ConfigurationError

__all__ = ["available_cpus", "fast_dtype", "fast_precision", "gpus_for_explorers", "share_cores"]

_WORTH_SHARING = 4  # cores
_OVERRULED = "LIGHTNING_RFT_BF16"


def available_cpus() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores(cores: int, explorers: int, *, overlap: bool) -> tuple[int, int]:
    """How many threads each explorer and the trainer get, where all compute on CPUs.

    Sides that work at the same time share the cores, since threads that wait for a core hold up all threads of their
    operation; sides that take turns get all of them each. So do both sides on fewer than four cores: on two, training
    fully asynchronously was a tenth slower with one core each, because each side leaves gaps that the other can fill.

    Args:
        cores: Cores of this machine.
        explorers: Number of explorers.
        overlap: Whether explorers work while the trainer does.

    Returns:
        Threads of each explorer, and of the trainer.

    Example:
        >>> share_cores(16, explorers=2, overlap=True), share_cores(16, explorers=2, overlap=False)
        ((4, 8), (8, 16))
    """
    if not overlap or cores < _WORTH_SHARING:
        return max(1, cores // explorers), cores
    each = max(1, cores // 2 // explorers)
    return each, max(1, cores - each * explorers)


def fast_dtype(device: str) -> str:
    """The dtype in which a device multiplies matrices fastest, of those that models are trained and served in.

    A CPU without units for bfloat16 multiplies it a hundred times slower than float32 (measured with torch 2.13 on
    AVX2), so "half the bytes, hence faster" is exactly wrong there. CPUs that do not say what they have count as such.
    The environment variable ``LIGHTNING_RFT_BF16`` (``0`` or ``1``) overrules what the hardware says.

    Args:
        device: Type of a torch device, such as ``"cpu"`` or ``"cuda"``.

    Returns:
        ``"bfloat16"`` where there are units for it; else ``"float16"`` on a GPU and ``"float32"`` on anything else.

    Raises:
        ConfigurationError: ``LIGHTNING_RFT_BF16`` is neither ``0`` nor ``1``.
    """
    if _has_bf16_units(device):
        return "bfloat16"
    return "float16" if device == "cuda" else "float32"


def fast_precision(device: str) -> str:
    """The ``Trainer(precision=...)`` that autocasts to :func:`fast_dtype`.

    Example:
        >>> fast_precision("mps")
        '32-true'
    """
    return {"bfloat16": "bf16-mixed", "float16": "16-mixed", "float32": "32-true"}[fast_dtype(device)]


def _has_bf16_units(device: str) -> bool:
    if device not in ("cpu", "cuda"):
        return False
    overruled = os.environ.get(_OVERRULED)
    if overruled is not None:
        if overruled not in ("0", "1"):
            raise ConfigurationError(f"{_OVERRULED}={overruled} must be 0 or 1, or not be set at all")
        return overruled == "1"
    if device == "cuda":
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    first = next((line for line in flags.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(first.split())


def gpus_for_explorers(
    visible: Sequence[str], trainer: Sequence[int], explorers: int, per_explorer: int
) -> list[str] | None:
    """Shares out the GPUs that the trainer does not use.

    Args:
        visible: Names of the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` lists them.
        trainer: Indices, among those, of the trainer's.
        explorers: Number of explorers.
        per_explorer: GPUs that one engine needs.

    Returns:
        ``CUDA_VISIBLE_DEVICES`` of every explorer; ``None`` if there are too few for each to have its own.

    Example:
        >>> gpus_for_explorers(["0", "1", "2", "3"], trainer=[0], explorers=3, per_explorer=1)
        ['1', '2', '3']
        >>> gpus_for_explorers(["0"], trainer=[0], explorers=1, per_explorer=1) is None
        True
    """
    free = [name for index, name in enumerate(visible) if index not in trainer]
    if len(free) < explorers * per_explorer:
        return None
    return [",".join(free[i * per_explorer : (i + 1) * per_explorer]) for i in range(explorers)]
