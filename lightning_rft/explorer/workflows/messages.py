"""Comparison of chat messages: a client that sends a conversation back may spell it in another way."""

from __future__ import annotations

import json
import pickle
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

__all__ = ["Said", "by_value", "said"]

_COMPARED = {"role", "content", "tool_calls"}
_IGNORED = {"id", "tool_call_id"}


class Said(NamedTuple):
    """What tells a message from others."""

    key: Hashable  # equal for messages that differ in white space around the content, or in how JSON is spelled
    spelling: Hashable
    more: Mapping[str, Any]  # such as reasoning, which a client may leave out

    def contradicts(self, other: Said) -> bool:
        """Whether two messages differ in what is compared only where both have it."""
        return any(other.more.get(name, value) != value for name, value in self.more.items())


def said(message: Mapping[str, Any]) -> Said:
    """What tells a plain message from others: role, content, and the names and arguments of its tool calls."""
    content, calls = message["content"], [_call(call) for call in message.get("tool_calls") or ()]
    key = message["role"], content.strip(), tuple((name, _canonical(arguments)) for name, arguments in calls)
    spelling = content, tuple(_text(arguments) for _, arguments in calls)
    more = {name: value for name, value in message.items() if value and name not in _COMPARED | _IGNORED}
    return Said(key, spelling, more)


def by_value(value: Any, *, sort_keys: bool = False) -> str:
    """A text that is equal for equal values."""
    # JSON and not a pickle, which differs with whether two equal parts are one object.
    return json.dumps(value, sort_keys=sort_keys, default=lambda other: pickle.dumps(other).hex())


def _call(call: Any) -> tuple[str, Any]:
    """Name and arguments of a tool call."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    return (function.get("name", ""), function.get("arguments")) if isinstance(function, Mapping) else ("", function)


def _canonical(arguments: Any) -> str:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return arguments.strip()
    return by_value(arguments, sort_keys=True)


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else by_value(arguments)
