"""Draws and permutations that are the same in all processes, each computed by itself: nothing is sorted or stored."""

from __future__ import annotations

import hashlib
import json

__all__ = ["draw", "key_of", "permute"]

_ROUNDS = 8


def draw(*parts: str | int) -> int:
    """64 bits that depend on every part, unlike those of ``hash`` also in another process."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big")


def key_of(*parts: str | int) -> bytes:
    """A key for :func:`permute` that depends on every part."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).digest()


def permute(position: int, count: int, key: bytes) -> int:
    """Returns the value at a position of the permutation of ``range(count)`` that a key selects.

    A Feistel network permutes the smallest range of 4^k numbers that holds ``count``. A result outside ``count`` is
    permuted again until it is inside: on average at most four times, and still a permutation.
    """
    bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = position >> bits, position & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_scrambled(right, number, key) & mask)
        position = left << bits | right
        if position < count:
            return position


def _scrambled(half: int, number: int, key: bytes) -> int:
    message = half.to_bytes(8, "big") + bytes([number])
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, key=key).digest(), "big")
