"""Defaults that depend on this machine's hardware."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lightning_rft.errors import ConfigurationError

__all__ = ["available_cpus", "available_memory", "fast_dtype", "fast_precision", "share_cores"]

_WORTH_SHARING = 4  # cores
_OVERRULED = "LIGHTNING_RFT_BF16"
_CGROUPS = [  # where the limit of memory and its use are told, in versions 2 and 1
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
]


def available_cpus() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that are free, or can be freed, for this process; 0 where the system does not say."""
    found = []
    with contextlib.suppress(OSError, LookupError):
        found.append(1024 * _table(Path("/proc/meminfo"))["MemAvailable:"])
    for folder, limit, used in _CGROUPS:  # of a container
        with contextlib.suppress(OSError, LookupError, ValueError):  # "max" is no number
            taken = int((folder / used).read_text()) - _table(folder / "memory.stat")["inactive_file"]
            found.append(int((folder / limit).read_text()) - taken)
    return max(0, min(found, default=0))


def _table(path: Path) -> dict[str, int]:
    """The numbers of a file of the kernel's, by the names before them."""
    return {name: int(number) for name, number, *_ in map(str.split, path.read_text(encoding="ascii").splitlines())}


def share_cores(cores: int, explorers: int, *, overlap: bool) -> tuple[int, int]:
    """CPU threads of each explorer, and of the trainer.

    Sides that work at the same time (``overlap``) share the cores, since a thread that waits for a core holds up all
    others of its operation. Sides that take turns get all cores each, and so do both on fewer than four cores: on two,
    asynchronous training was a tenth slower with one core each, because each side fills the other's gaps.

    Example:
        >>> share_cores(16, explorers=2, overlap=True), share_cores(16, explorers=2, overlap=False)
        ((4, 8), (8, 16))
    """
    if not overlap or cores < _WORTH_SHARING:
        return max(1, cores // explorers), cores
    each = max(1, cores // 2 // explorers)
    return each, max(1, cores - each * explorers)


def fast_dtype(device: str) -> str:
    """The dtype in which a device (``"cpu"``, ``"cuda"``) multiplies matrices fastest.

    A CPU without bfloat16 units multiplies it a hundred times slower than float32 (torch 2.13 on AVX2); a CPU that does
    not list its features counts as one. The environment variable ``LIGHTNING_RFT_BF16`` (``0`` or ``1``) overrules what
    the hardware says.
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
