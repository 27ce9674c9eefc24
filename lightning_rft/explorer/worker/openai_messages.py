"""The message that an answer of the policy is to a client: its text, its reasoning, its tool calls. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lightning_rft.explorer.worker.openai_requests import Call
from lightning_rft.explorer.worker.parsers import Parsed, Parser
from lightning_rft.explorer.workflows.reply import Reply

__all__ = ["answer_message"]


def answer_message(call: Call, reply: Reply, parser: Parser | None, stop: Sequence[str]) -> dict[str, Any]:
    """The message of the assistant.

    ``stop`` are the texts that end an answer.

    Raises:
        Exception: What a parser raises for a text that it cannot read.
    """
    if call.tool_choice in ("required", "named"):
        parsed = Parsed(None, None, _forced(call, str(reply)))
    elif parser is not None:
        parsed = parser(reply, stop, call.tools, call.tool_choice)
    else:
        parsed = Parsed(None, str(reply), [])
    calls = [
        {
            "id": given or _call_id(reply, index),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for index, (given, name, arguments) in enumerate(parsed.calls[: None if call.parallel else 1])
    ]
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content if calls else parsed.content or ""}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _forced(call: Call, text: str) -> list[tuple[str | None, str, str]]:
    """The calls that a grammar had the model write as JSON."""
    said = json.loads(text)
    if call.tool_choice == "named":
        return [(None, call.tool_name, text)]
    return [(None, one["name"], json.dumps(one["parameters"], ensure_ascii=False)) for one in said]


def _call_id(reply: Reply, index: int) -> str:
    """The same in every run, since some templates show it; of nine letters and digits, as some demand."""
    digest = hashlib.blake2b(repr((reply.turn.prompt_ids.tobytes(), reply.token_ids, index)).encode(), digest_size=5)
    return digest.hexdigest()[:9]
