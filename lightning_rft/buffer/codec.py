"""An experience as a row of the buffer, with its turns as the bytes that an explorer packed, and a checksum."""

from __future__ import annotations

import json
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from lightning_rft.experience import Experience, Group, GroupKey, Support, Truncation, Turn

__all__ = ["COLUMNS", "from_row", "to_group", "to_row", "unpack"]

COLUMNS = (
    "sample, reward, rewards, num_tokens, oldest_version, newest_version, finish_reason, generate_seconds,"
    " reward_seconds, metrics, text, turns"
)

_Support = tuple[bytes, bytes, bytes] | None
_Packed = tuple[  # the arguments of Turn, in order
    bytes, bytes, bytes, bytes, str, float, Truncation, int | None, float | None, bytes | None, _Support
]  # fmt: skip
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[_Packed])
_NUMBERS = msgspec.json.Decoder(dict[str, float])


def to_row(experience: Experience) -> tuple[Any, ...]:
    """The values of :data:`COLUMNS`; ValueError if no token was sampled."""
    frame = _ENCODER.encode([_pack(turn) for turn in experience.turns])
    rewards = _text(experience.rewards)
    return (
        experience.sample,
        experience.reward,
        rewards,
        experience.num_tokens,
        experience.oldest_version,
        experience.newest_version,
        experience.turns[-1].finish_reason,
        experience.generate_seconds,
        experience.reward_seconds,
        _text(experience.metrics),
        experience.text,
        _checksum(frame, experience.sample, experience.reward, rewards) + frame,
    )


def to_group(key: GroupKey, task_id: str, rows: Iterable[Sequence[Any]], samples: int | None) -> Group:
    """A stored group; sqlite3.DatabaseError if it is damaged, or has another number of samples than were stored."""
    experiences = tuple(from_row(task_id, row) for row in rows)
    if len(experiences) != samples:
        raise sqlite3.DatabaseError(f"a stored group is malformed: it has {len(experiences)} samples of {samples}")
    return Group(key, task_id, experiences)


def from_row(task_id: str, row: Sequence[Any]) -> Experience:
    """The experience that :func:`to_row` was given."""
    sample, reward, rewards, _, _, _, _, generate_seconds, reward_seconds, metrics, text, turns = row
    whole = unpack(turns, sample, reward, rewards)
    return Experience(
        *(task_id, sample, whole, reward, text, generate_seconds, reward_seconds), _numbers(rewards), _numbers(metrics)
    )


def unpack(blob: bytes, sample: int, reward: float, rewards: str) -> tuple[Turn, ...]:
    """The turns of the last column.

    Raises sqlite3.DatabaseError, as SQLite does for damage to its own pages, if anything that makes a gradient changed.
    """
    frame = memoryview(blob)[4:]
    if _checksum(frame, sample, reward, rewards) != blob[:4]:
        raise sqlite3.DatabaseError("a stored sample is malformed: its checksum differs")
    return tuple(_unpack(*values) for values in _DECODER.decode(frame))


def _text(numbers: Mapping[str, float]) -> str:
    return json.dumps({name: float(number) for name, number in numbers.items()})


def _numbers(text: str) -> dict[str, float]:
    try:
        return _NUMBERS.decode(text)
    except msgspec.DecodeError as error:  # the checksum leaves out what makes no gradient
        raise sqlite3.DatabaseError(f"a stored sample is malformed: {error}") from error


def _checksum(frame: bytes | memoryview, sample: int, reward: float, rewards: str) -> bytes:
    numbers = zlib.crc32(struct.pack("<qd", sample, reward) + rewards.encode())
    return zlib.crc32(frame, numbers).to_bytes(4, "little")


def _pack(turn: Turn) -> tuple[Any, ...]:
    *values, support = turn.packed()
    return (*values, None if support is None else support.packed())


def _unpack(*values: Any) -> Turn:
    *arguments, support = values
    return Turn(*[*arguments, None if support is None else Support(*support)])
