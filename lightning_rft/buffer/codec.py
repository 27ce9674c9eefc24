"""An experience as a row of the buffer, its turns as bytes: packed numbers in a small frame, with a checksum.

What comes back equals what went in, bit by bit: log-probs are packed as float32 only where nothing is lost by it, as
with engines that compute them so, and else as float64.
"""

from __future__ import annotations

import sqlite3
import struct
import zlib
from collections.abc import Sequence
from itertools import chain, groupby, repeat
from typing import Any

import msgspec

from lightning_rft.experience import Experience, Turn

__all__ = ["COLUMNS", "from_row", "to_row", "unpack"]

COLUMNS = (
    "sample, reward, num_tokens, oldest_version, newest_version, finish_reason, generate_seconds, reward_seconds, text,"
    " turns"
)


class _Packed(msgspec.Struct, array_like=True):
    """A turn. Numbers are little-endian, ids int32; ``versions`` are (version, number of tokens)."""

    prompt_ids: bytes
    token_ids: bytes
    logprobs_type: str
    logprobs: bytes
    versions: list[tuple[int, int]]
    finish_reason: str


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[_Packed])


def to_row(experience: Experience) -> tuple[Any, ...]:
    """The values of :data:`COLUMNS`, in one pass over the tokens.

    Raises:
        ValueError: No token was sampled.
    """
    packed = [_pack(turn) for turn in experience.turns]
    versions = [version for turn in packed for version, _ in turn.versions]
    frame = _ENCODER.encode(packed)
    return (
        experience.sample,
        experience.reward,
        experience.num_tokens,
        min(versions),
        max(versions),
        experience.turns[-1].finish_reason,
        experience.generate_seconds,
        experience.reward_seconds,
        experience.text,
        zlib.crc32(frame).to_bytes(4, "little") + frame,
    )


def from_row(task_id: str, row: Sequence[Any]) -> Experience:
    """The experience again.

    Raises:
        sqlite3.DatabaseError: As :func:`unpack`.
    """
    sample, reward, _, _, _, _, generate_seconds, reward_seconds, text, turns = row
    return Experience(task_id, sample, unpack(turns), reward, text, generate_seconds, reward_seconds)


def unpack(blob: bytes) -> tuple[Turn, ...]:
    """The turns of the last column.

    Raises:
        sqlite3.DatabaseError: The bytes are damaged. SQLite notices this only in what it writes itself; to our caller
            it is the same mishap.
    """
    frame = blob[4:]
    if zlib.crc32(frame).to_bytes(4, "little") != blob[:4]:
        raise sqlite3.DatabaseError("stored tokens are malformed: their checksum differs")
    return tuple(_unpack(turn) for turn in _DECODER.decode(frame))


def _pack(turn: Turn) -> _Packed:
    kind = "f"
    try:
        logprobs = _bytes(kind, turn.logprobs)
        exact = _numbers(kind, logprobs) == tuple(turn.logprobs)
    except OverflowError:
        exact = False
    if not exact:
        kind = "d"
        logprobs = _bytes(kind, turn.logprobs)
    return _Packed(
        _bytes("i", turn.prompt_ids),
        _bytes("i", turn.token_ids),
        kind,
        logprobs,
        _runs(turn.versions),
        turn.finish_reason,
    )


def _bytes(kind: str, numbers: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}{kind}", *numbers)


def _numbers(kind: str, data: bytes) -> tuple[Any, ...]:
    return struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data)


def _runs(versions: Sequence[int]) -> list[tuple[int, int]]:
    if versions and versions.count(versions[0]) == len(versions):  # nearly always, and quicker
        return [(versions[0], len(versions))]
    return [(version, sum(1 for _ in run)) for version, run in groupby(versions)]


def _unpack(turn: _Packed) -> Turn:
    return Turn(
        _numbers("i", turn.prompt_ids),
        _numbers("i", turn.token_ids),
        _numbers(turn.logprobs_type, turn.logprobs),
        tuple(chain.from_iterable(repeat(version, count) for version, count in turn.versions)),
        turn.finish_reason,
    )
