"""The shapes of requests in OpenAI's dialect, as far as they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

__all__ = [
    "Chat",
    "Completion",
    "Format",
    "Generate",
    "Message",
    "Request",
    "Sampled",
    "SampledIds",
    "TokenIds",
    "Tool",
    "ToolCall",
]

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], msgspec.Meta(min_length=1)]


class Streaming(msgspec.Struct):
    include_usage: bool | None = None


class Format(msgspec.Struct):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class Sampled(msgspec.Struct):
    """Settings that all routes name alike."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    logit_bias: dict[int, float] | None = None
    structured_outputs: dict[str, Any] | None = None


class Request(Sampled):
    """What both of OpenAI's routes take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: Streaming | None = None
    return_token_ids: bool | None = None
    response_format: Format | None = None


class Part(msgspec.Struct):
    type: Literal["text"]
    text: str


class Called(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(msgspec.Struct):
    """A call of a function, in a message of the assistant."""

    function: Called
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    """A message of a conversation."""

    role: str
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(msgspec.Struct):
    name: str
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    """A function that may be called, or the one that must be."""

    type: Literal["function"]
    function: Function


class Chat(Request, kw_only=True):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None


class Completion(Request, kw_only=True):
    """The body of ``/v1/completions``."""

    prompt: str | list[Any]
    logprobs: int | None = None


class SampledIds(Sampled):
    """The ``sampling_params`` of :class:`Generate`."""

    logprobs: int | None = None


class Generate(msgspec.Struct):
    """The body of ``/inference/v1/generate``."""

    token_ids: TokenIds
    sampling_params: dict[str, Any] = {}
    model: str | None = None
    stream: bool | None = None
