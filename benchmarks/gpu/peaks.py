"""What cards can multiply at most: by their maker, and as measured."""

from __future__ import annotations

import re
import time

import torch

__all__ = ["card_tflops", "measured_tflops", "now"]

# TFLOP/s of dense bfloat16 with sums in float32, without sparsity, as NVIDIA's data sheets of each card give it (those
# of H100, H200, L4 and L40S print the value with sparsity, which is twice as much); RTX 4090: appendix of the Ada white
# paper. A T4 has no bfloat16: float16.
_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "L4": 121.0,
    "T4": 65.0,
}
_PARTS = ("MIG", "Laptop", "NVL")  # less than the card of that name
_REPEATS = 10


def card_tflops(name: str) -> float | None:
    """TFLOP/s of a card in half precision, by its name as CUDA has it; ``None`` for one that is not in the table."""
    if any(part in name for part in _PARTS):
        return None
    return next((peak for card, peak in _TFLOPS.items() if re.search(rf"\b{card}\b", name)), None)


def measured_tflops(device: str, dtype: torch.dtype, size: int) -> float:
    """TFLOP/s of the best of some products of two square matrices of random numbers."""
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
    seconds = []
    for _ in range(_REPEATS):
        began = now(device)
        torch.mm(left, right)
        seconds.append(now(device) - began)
    return 2 * size**3 / min(seconds) / 1e12


def now(device: str) -> float:
    """The time when everything that was asked of a device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
