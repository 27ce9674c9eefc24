"""Texts that end an answer: looked for token by token in what was sampled, alike for all engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["reach", "stop_at"]

_BROKEN = "\ufffd"  # in place of a character of which some bytes are still to come
_SPARE = 8  # tokens: special ones, which have no text, and a first one that is half a character


def stop_at(tokenizer: Any, token_ids: Sequence[int], stop: Sequence[str]) -> int | None:
    """Index in the decoded text of the first of the texts that the last token completed; ``None`` if it did not."""
    text, before = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (token_ids, token_ids[:-1]))
    known = len(before.rstrip(_BROKEN))
    found = [text.find(one, max(0, known - len(one) + 1)) for one in stop]
    return min((index for index in found if index >= 0), default=None)


def reach(stop: Sequence[str]) -> int:
    """How many of the last tokens may hold such a text: at most one for each of its bytes, and some to spare."""
    return _SPARE + max(len(one.encode()) for one in stop)
