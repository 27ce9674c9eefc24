"""Prompts: what may be one, and its token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rft.errors import ConfigurationError

__all__ = [
    "Prompt",
    "check_prompt",
    "encode_after",
    "encode_later",
    "encode_prompt",
    "encode_prompts",
    "ends_open",
    "is_rendered",
    "plain_message",
    "prompt_problem",
    "text_problem",
]

Prompt = str | Sequence[Mapping[str, Any]]

_MARK = "<<the-answer-was-here>>"


def prompt_problem(prompt: Any) -> str | None:
    """What keeps a value from being a prompt, for the message "<where>: <problem>; give ..."."""
    if prompt is None:
        return "the prompt is None"
    if isinstance(prompt, str):
        return text_problem(prompt, "the prompt") if prompt.strip() else "the prompt is blank"
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        return f"the prompt is a {type(prompt).__name__}"
    if not prompt:
        return "the prompt has no messages"
    problems = (_message_problem(message, f"message {index} of the prompt") for index, message in enumerate(prompt))
    return next((problem for problem in problems if problem), None)


def text_problem(text: str, name: str) -> str | None:
    """What keeps a text from being encoded: a lone surrogate, half of a character that takes two in UTF-16."""
    try:
        str.encode(text)
    except UnicodeEncodeError as error:
        return f"{name} has a lone surrogate at character {error.start}, which is no text"
    return None


def check_prompt(prompt: Any) -> None:
    """Raises ConfigurationError for what is no prompt."""
    problem = prompt_problem(prompt)
    if problem:
        raise ConfigurationError(f"{problem}; give text, or chat messages with `role` and `content`")


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    template: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[int, ...]:
    """Token ids of a prompt; see :func:`encode_prompts`."""
    return encode_prompts(tokenizer, [prompt], template, tools)[0]


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    template: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of prompts: plain text as it is, chat messages through the tokenizer's chat template.

    ``template`` holds variables of the template, ``tools`` what it says of tools. A last message of the assistant is
    the beginning of the answer. Text that begins with the token for the beginning of a sequence is rendered already,
    and gets no second one.

    Raises:
        ConfigurationError: One is no prompt, or the template refuses it.
    """
    alike: dict[tuple[bool, bool], list[int]] = {}
    for index, prompt in enumerate(prompts):
        check_prompt(prompt)
        kind = isinstance(prompt, str), ends_open(prompt) or is_rendered(tokenizer, prompt)
        alike.setdefault(kind, []).append(index)
    ids: list[tuple[int, ...]] = [()] * len(prompts)
    for (plain, special), indices in alike.items():
        alike_ones = [prompts[index] for index in indices]
        if plain:
            encoded = _encode_texts(tokenizer, alike_ones, special)
        else:
            chats = [
                [plain_message(message) for message in chat if not isinstance(message, str)] for chat in alike_ones
            ]
            encoded = _apply(tokenizer, chats, special, template, tools)
        for index, of_one in zip(indices, encoded, strict=True):
            ids[index] = tuple(of_one)
    return ids


def is_rendered(tokenizer: Any, prompt: Prompt) -> bool:
    """Whether a prompt is text that a chat template has rendered already."""
    begin: str | None = getattr(tokenizer, "bos_token", None)
    return isinstance(prompt, str) and begin is not None and prompt.startswith(begin)


def encode_after(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    index: int,
    template: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    end: int | None = None,
    more: str = "",
) -> list[int] | None:
    """Token ids of what the chat template puts after one message, an answer; None if it does not tell.

    ``end`` is the id that the answer ended with, if it did not break off; ``more`` is what the message has after it.
    """
    before, message, after = messages[:index], messages[index], messages[index + 1 :]
    mark = {"role": message["role"], "content": _MARK + more}
    behind = _behind_mark(tokenizer, [*before, mark, *after], template, tools)
    if behind is not None or end is None:
        return behind
    # The answer's tokens are known, tool calls among them; but some templates look back from a result to its call.
    behind = _behind_mark(tokenizer, [*before, {**message, "content": _MARK}, *after], template, tools)
    return None if behind is None or end not in behind else behind[behind.index(end) :]


def _behind_mark(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[int] | None:
    chat = [plain_message(message) for message in messages]
    continues = ends_open(chat) and not chat[-1]["content"].startswith(_MARK)
    try:
        (text,) = _apply(tokenizer, [chat], continues, template, tools, tokenize=False)
    except ConfigurationError:
        return None
    _, *behind = text.split(_MARK)
    return encode_later(tokenizer, behind[0]) if len(behind) == 1 else None


def encode_later(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text that does not begin a sequence."""
    # Behind a token, since some tokenizers put a space in front of the beginning of a text.
    anchor: str = getattr(tokenizer, "eos_token", None) or ""
    ids: list[int] = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
    if not anchor or ids[0] == tokenizer.eos_token_id:
        return ids[1:] if anchor else ids
    plainly: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return plainly


def ends_open(prompt: Prompt) -> bool:
    """Whether a prompt ends with the beginning of the answer."""
    if isinstance(prompt, str):
        return False
    last = plain_message(prompt[-1])
    return last["role"] == "assistant" and bool(str(last["content"]).strip()) and not last.get("tool_calls")


def _encode_texts(tokenizer: Any, texts: Sequence[Prompt], rendered: bool) -> Sequence[Sequence[int]]:
    ids: Sequence[Sequence[int]] = tokenizer(texts, **({"add_special_tokens": False} if rendered else {}))["input_ids"]
    return ids


def _apply(
    tokenizer: Any,
    chats: Sequence[Any],
    continues: bool,
    template: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    tokenize: bool = True,
) -> Any:
    """What the chat template makes of conversations: lists of token ids, or texts."""
    if not tokenizer.chat_template:
        raise ConfigurationError(
            "the tokenizer has no chat template for chat messages: set tokenizer.chat_template and save it, or give "
            "plain text"
        )
    if tools and "tools" not in str(tokenizer.chat_template):
        raise ConfigurationError(
            "the tokenizer's chat template has no place for tools, so that the model would not know of them: set "
            "tokenizer.chat_template to one that renders `tools`, or describe them in a message"
        )
    try:
        return tokenizer.apply_chat_template(
            chats,
            tools=list(tools) if tools else None,
            tokenize=tokenize,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            return_dict=False,
            **template or {},
        )
    except Exception as error:  # jinja's, or whatever a template's own code runs into
        raise ConfigurationError(
            f"the tokenizer's chat template refuses the messages ({type(error).__name__}: {error}): give it the roles "
            "that it takes, in the order that it wants"
        ) from error


def _message_problem(message: Any, name: str) -> str | None:
    if not isinstance(message, Mapping) or message.get("role") is None:
        return f"{name} lacks role or content"
    content = parts = message.get("content")
    if content is None and not message.get("tool_calls"):
        return f"{name} has no content" if "content" in message else f"{name} lacks role or content"
    if content is None:
        return None
    if isinstance(content, str):
        return text_problem(content, name)
    if not isinstance(parts, Sequence) or not all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        return f"the content of {name} is neither text nor a list of parts of type 'text'"
    return next((problem for part in parts if (problem := text_problem(part["text"], name))), None)


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as every template takes it: its content as text, and no key without a value."""
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content", "")
    plain["content"] = str(content) if isinstance(content, str) else "".join(part["text"] for part in content)
    return plain
