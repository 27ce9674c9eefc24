"""vLLM's parsers of reasoning and tool calls, where vLLM is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.workflows.reply import Reply

__all__ = ["Parsed", "Parser"]


class Parsed(NamedTuple):
    """What an answer says."""

    reasoning: str | None
    content: str | None
    calls: list[tuple[str | None, str, str]]  # id if the model gives one, name, and arguments as JSON


class Parser:
    """Parsers by the names that vLLM's ``--tool-call-parser`` and ``--reasoning-parser`` take."""

    def __init__(self, tokenizer: Any, tool_parser: str | None, reasoning_parser: str | None) -> None:
        given = {"tool_parser": tool_parser, "reasoning_parser": reasoning_parser}
        named = ", ".join(f"{setting}={name!r}" for setting, name in given.items() if name)
        try:
            from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
            from vllm.parser import ParserManager
            from vllm.tokenizers.hf import get_cached_tokenizer
        except ImportError as error:
            raise ConfigurationError(
                f"{named}: these are vLLM's parsers: install lightning-rft[vllm], or leave them out and parse the text "
                f"in the agent ({error})"
            ) from error
        self._request = ChatCompletionRequest
        self._tokenizer = get_cached_tokenizer(tokenizer)  # else each parser reads the whole vocabulary anew
        try:
            self._parser = ParserManager.get_parser(tool_parser, reasoning_parser, enable_auto_tools=True)
            self._parser(self._tokenizer)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(f"{named}: {error}; see vLLM's --tool-call-parser for names") from error

    def __call__(
        self, reply: Reply, stop: Sequence[str], tools: Sequence[dict[str, Any]] | None, choice: str
    ) -> Parsed:
        """Parses an answer, as far as it goes before what ended it."""
        request = self._request(messages=[], **({"tools": tools, "tool_choice": choice} if tools else {}))
        parser = self._parser(self._tokenizer, request.tools)
        request = parser.adjust_request(request)  # says whether special tokens are part of the text
        ids, plainly = reply.token_ids, request.skip_special_tokens
        text = self._tokenizer.decode(ids, skip_special_tokens=plainly)
        if reply.finish_reason == "stop":
            end = max((text.rfind(one) for one in stop), default=-1)
            text = self._tokenizer.decode(ids[:-1], skip_special_tokens=plainly) if end < 0 else text[:end]
        reasoning, content, calls = parser.parse(text, request, enable_auto_tools=True, model_output_token_ids=ids)
        if not plainly and content:  # to the client, special tokens have no text
            for special in self._tokenizer.all_special_tokens:
                content = content.replace(special, "")
        return Parsed(reasoning, content or None, [(call.id, call.name, call.arguments) for call in calls or ()])
