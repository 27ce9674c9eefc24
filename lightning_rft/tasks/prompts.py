"""Prompts: what may be one, and its token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rft.errors import ConfigurationError

__all__ = ["Prompt", "encode_prompt", "encode_prompts", "ends_open", "is_rendered", "prompt_problem", "text_problem"]

Prompt = str | Sequence[Mapping[str, Any]]


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


def encode_prompt(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt; see :func:`encode_prompts`."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Token ids of prompts: plain text as it is, chat messages through the tokenizer's chat template.

    A last message of the assistant is the beginning of the answer. Text that begins with the token for the beginning of
    a sequence is rendered already, and gets no second one.

    Raises:
        ConfigurationError: One is no prompt, or the template refuses it.
    """
    alike: dict[tuple[bool, bool], list[int]] = {}
    for index, prompt in enumerate(prompts):
        problem = prompt_problem(prompt)
        if problem:
            raise ConfigurationError(f"{problem}; give text, or chat messages with `role` and `content`")
        kind = isinstance(prompt, str), ends_open(prompt) or is_rendered(tokenizer, prompt)
        alike.setdefault(kind, []).append(index)
    ids: list[tuple[int, ...]] = [()] * len(prompts)
    for (plain, special), indices in alike.items():
        encode = _encode_texts if plain else _encode_chats
        for index, encoded in zip(indices, encode(tokenizer, [prompts[i] for i in indices], special), strict=True):
            ids[index] = tuple(encoded)
    return ids


def is_rendered(tokenizer: Any, prompt: Prompt) -> bool:
    """Whether a prompt is text that a chat template has rendered already."""
    begin: str | None = getattr(tokenizer, "bos_token", None)
    return isinstance(prompt, str) and begin is not None and prompt.startswith(begin)


def ends_open(prompt: Prompt) -> bool:
    """Whether a prompt ends with the beginning of the answer."""
    if isinstance(prompt, str):
        return False
    last = _plain(prompt[-1])
    return last["role"] == "assistant" and bool(str(last["content"]).strip()) and not last.get("tool_calls")


def _encode_texts(tokenizer: Any, texts: Sequence[Prompt], rendered: bool) -> Sequence[Sequence[int]]:
    ids: Sequence[Sequence[int]] = tokenizer(texts, **({"add_special_tokens": False} if rendered else {}))["input_ids"]
    return ids


def _encode_chats(tokenizer: Any, chats: Sequence[Prompt], continues: bool) -> Sequence[Sequence[int]]:
    if not tokenizer.chat_template:
        raise ConfigurationError(
            "the tokenizer has no chat template for chat messages: set tokenizer.chat_template and save it, or give "
            "plain text"
        )
    messages = [[_plain(message) for message in chat if not isinstance(message, str)] for chat in chats]
    try:
        ids: Sequence[Sequence[int]] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=not continues, continue_final_message=continues, return_dict=False
        )
    except Exception as error:  # jinja's, or whatever a template's own code runs into
        raise ConfigurationError(
            f"the tokenizer's chat template refuses the messages ({type(error).__name__}: {error}): give it the roles "
            "that it takes, in the order that it wants"
        ) from error
    return ids


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


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as every template takes it: its content as text, and no key without a value."""
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content", "")
    plain["content"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return plain
