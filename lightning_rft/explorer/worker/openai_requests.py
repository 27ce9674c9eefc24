"""Requests in OpenAI's dialect: the call of the policy that one asks for, or why it is refused.

Pure. How to sample is the run's to say: a client's temperature and the like are replaced, and what changes
probabilities in ways that training cannot account for is refused. Whatever else is unknown is ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from lightning_rft.explorer.worker.openai_types import (
    Chat,
    Completion,
    Format,
    Generate,
    Message,
    Request,
    Sampled,
    SampledIds,
    TokenIds,
    Tool,
    ToolCall,
)

__all__ = ["FULL", "Call", "Refusal", "chat_call", "completion_call", "generate_call", "plain_message"]

FULL = "context_length_exceeded"  # OpenAI's code for a prompt that does not fit

_T = TypeVar("_T")
_REPLACED = ("temperature", "top_p", "top_k", "min_p", "seed")
_REFUSED: Mapping[str, Any] = {  # with the one value, beside null, that changes nothing
    **{"n": 1, "best_of": 1, "echo": False, "suffix": "", "use_beam_search": False, "ignore_eos": False},
    **{"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "length_penalty": 1, "bad_words": []},
    **{"prompt_logprobs": None, "functions": [], "modalities": ["text"], "audio": None},
}


class Refusal(Exception):
    """A request that is answered with an error, in OpenAI's shape."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 500: "server_error"}.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Call:
    """A call of the policy, and how to answer it."""

    prompt: Any  # text, messages or token ids
    settings: Mapping[str, tuple[str, Any]]  # of this call, each with what the client calls it
    model: str
    replaced: Mapping[str, Any]  # what the client asked of sampling that the run decides
    tools: list[dict[str, Any]] | None = None
    tool_choice: str = "none"  # or "auto", "required", "named"
    tool_name: str = ""  # of the function that must be called
    parallel: bool = True  # may call several functions at a time
    logprobs: int | None = None  # of how many other tokens beside the sampled one; None: of neither
    token_ids: bool = False
    stream: bool = False
    usage: bool = False  # at the end of a stream
    prompt_name: str = "prompt"  # what the client calls it


def chat_call(body: Mapping[str, Any]) -> Call:
    """Of ``/v1/chat/completions``."""
    asked = _typed(body, Chat)
    settings = _settings(asked) | _constraint(asked.response_format)
    if asked.max_completion_tokens is not None:
        settings["max_new_tokens"] = "max_completion_tokens", asked.max_completion_tokens
    if asked.chat_template_kwargs:
        settings["chat_template_kwargs"] = "chat_template_kwargs", asked.chat_template_kwargs
    tools, several = asked.tools or [], asked.parallel_tool_calls is not False
    chosen = asked.tool_choice or "auto"
    choice, name = ("named", chosen.function.name) if isinstance(chosen, Tool) else (chosen, "")
    if choice in ("required", "named"):
        schema = _calls_schema(tools, several) if choice == "required" else _arguments_schema(tools, name)
        settings["structured"] = "tool_choice", {"json": schema}
    return Call(
        [plain_message(message) for message in asked.messages],
        settings,
        **_answered(body, asked),
        tools=body["tools"] if tools else None,
        tool_choice=choice if tools else "none",
        tool_name=name,
        parallel=several,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        prompt_name="messages",
    )


def completion_call(body: Mapping[str, Any]) -> Call:
    """Of ``/v1/completions``."""
    asked = _typed(body, Completion)
    prompt: Any = asked.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # a batch of one
    if not isinstance(prompt, str):
        prompt = tuple(_converted(prompt, TokenIds, "prompt"))
    settings = _settings(asked) | _constraint(asked.response_format)
    return Call(prompt, settings, **_answered(body, asked), logprobs=asked.logprobs)


def generate_call(body: Mapping[str, Any]) -> Call:
    """Of vLLM's ``/inference/v1/generate``: token ids in, token ids out."""
    asked = _typed(body, Generate)
    if asked.stream:
        raise Refusal("this route does not stream: leave it out", "stream")
    _refuse(asked.sampling_params, "sampling_params.")
    wanted = _converted(asked.sampling_params, SampledIds, "sampling_params")
    return Call(
        tuple(asked.token_ids),
        _settings(wanted, "sampling_params."),
        model=asked.model or "policy",
        replaced=_replaced(asked.sampling_params),
        # vLLM's 1 is of the sampled token and of the most likely one; it is sent by those who want the former
        logprobs=None if wanted.logprobs is None else max(0, wanted.logprobs - 1),
        prompt_name="token_ids",
    )


def plain_message(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it: content as text, arguments as objects, and no key without a value."""
    if not isinstance(message, Message):
        message = msgspec.convert(message, Message)
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    plain = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
        "reasoning_content": message.reasoning_content,
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _arguments(call)}}
            for call in message.tool_calls or ()
        ],
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }
    return {key: value for key, value in plain.items() if value or key == "content"}


def _arguments(call: ToolCall) -> Any:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _settings(asked: Sampled, prefix: str = "") -> dict[str, tuple[str, Any]]:
    constraint = {name: value for name, value in (asked.structured_outputs or {}).items() if value is not None}
    chosen = {
        "max_new_tokens": ("max_tokens", asked.max_tokens),
        "min_new_tokens": ("min_tokens", asked.min_tokens),
        "stop": ("stop", asked.stop or None),
        "stop_token_ids": ("stop_token_ids", asked.stop_token_ids or None),
        "logit_bias": ("logit_bias", asked.logit_bias or None),
        "structured": ("structured_outputs", constraint or None),
    }
    return {setting: (prefix + name, value) for setting, (name, value) in chosen.items() if value is not None}


def _constraint(wanted: Format | None) -> dict[str, tuple[str, Any]]:
    """The setting that a ``response_format`` comes down to."""
    if wanted is None or wanted.type == "text":
        return {}
    schema = (wanted.json_schema or {}).get("schema") if wanted.type == "json_schema" else {"type": "object"}
    if not isinstance(schema, Mapping) or not schema:
        raise Refusal("a response_format of type json_schema needs json_schema.schema", "response_format")
    return {"structured": ("response_format", {"json": schema})}


def _answered(body: Mapping[str, Any], asked: Request) -> dict[str, Any]:
    _refuse(body)
    return {
        "model": asked.model or "policy",
        "replaced": _replaced(body),
        "token_ids": bool(asked.return_token_ids),
        "stream": bool(asked.stream),
        "usage": bool(asked.stream_options and asked.stream_options.include_usage),
    }


def _refuse(body: Mapping[str, Any], prefix: str = "") -> None:
    for name, harmless in _REFUSED.items():
        value = body.get(name)
        if value is not None and value != harmless:
            raise Refusal(
                f"{name}={value!r} is refused, since training could not account for it: leave it out",
                prefix + name,
                "unsupported_parameter",
            )


def _replaced(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: body[name] for name in _REPLACED if body.get(name) is not None}


def _arguments_schema(tools: Sequence[Tool], name: str) -> dict[str, Any]:
    for tool in tools:
        if tool.function.name == name:
            return tool.function.parameters or {"type": "object", "properties": {}}
    raise Refusal(f"tool_choice names {name!r}, which is not in `tools`", "tool_choice")


def _calls_schema(tools: Sequence[Tool], several: bool) -> dict[str, Any]:
    """Of a list of calls, which any model can write under a grammar."""
    if not tools:
        raise Refusal("tool_choice 'required' needs `tools`", "tool_choice")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": _arguments_schema(tools, name)},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in (tool.function.name for tool in tools)
    ]
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}} | ({} if several else {"maxItems": 1})


def _typed(body: Any, kind: Callable[..., _T]) -> _T:
    if not isinstance(body, dict):
        raise Refusal("the body is no JSON object")
    return _converted(body, kind, "")


def _converted(value: Any, kind: Any, name: str) -> Any:
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        path = re.sub(r"^\.", "", name + where.rstrip("`")) or None
        missing = re.search(r"missing required field `(\w+)`", what)
        raise Refusal(what, ".".join(filter(None, (path, missing and missing[1]))) or None) from None
