"""The specification of an explorer: everything that it is told when it starts, and how long its context must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.explorer.workflows.policy import Workflow
from lightning_rft.model_folder import context_length
from lightning_rft.settings import Timeouts, Tolerance
from lightning_rft.tasks.prompts import Prompt, encode_prompt

__all__ = ["ExplorerSpec", "fitting_length"]

_MEASURED_PROMPTS = 512
_PROMPT_ROOM = 128


@dataclass(frozen=True)
class ExplorerSpec:
    """Everything that an explorer is told when it starts.

    Args:
        engine: Description of the engine.
        model: Model path or hub name.
        workflow: Answers a task.
        reward: Scores an answer.
        max_model_len: Maximum tokens of prompt and answer together.
        seed: Seed of the run.
        tolerance: How often a sample is tried again.
        timeouts: How long rewards, samples and the start of the engine may take.
    """

    engine: Engine
    model: str
    workflow: Workflow
    reward: Callable[..., Any]
    max_model_len: int
    seed: int
    tolerance: Tolerance
    timeouts: Timeouts


def fitting_length(
    model: str, prompts: Sequence[Prompt], *, max_new_tokens: int, max_model_len: int | None, single_turn: bool
) -> int:
    """Maximum tokens of prompt and answer together that engines are made for.

    Args:
        model: Path of a folder, or hub name.
        prompts: All that will be asked, at least one.
        max_new_tokens: Maximum tokens per answer.
        max_model_len: What the engine's description says, which is then the result.
        single_turn: Whether a prompt gets one answer; else turns may fill the model's context.

    Raises:
        ConfigurationError: There is no tokenizer, it has no chat template and one is needed, or prompts and answers do
            not fit the context.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model={model!r} has no tokenizer that can be loaded: {error}") from error
    if not all(isinstance(prompt, str) for prompt in prompts) and not tokenizer.chat_template:
        raise ConfigurationError(
            f"tasks have chat messages as prompts, but the tokenizer of model={model!r} has no chat template: set "
            "tokenizer.chat_template and save it, or give plain text"
        )
    # tokenising all of a large set would take minutes; the longest by characters are the longest by tokens, nearly
    longest = sorted(prompts, key=_characters, reverse=True)[:_MEASURED_PROMPTS]
    prompt_tokens = max(len(encode_prompt(tokenizer, prompt)) for prompt in longest)
    context = context_length(model) if max_model_len is None else max_model_len
    if context is not None and prompt_tokens > context:
        raise ConfigurationError(
            f"a prompt of {prompt_tokens} tokens is longer than the context of {context} tokens: shorten or drop it"
            + ("" if max_model_len is None else ", or raise the engine's max_model_len")
        )
    needed = prompt_tokens + max_new_tokens
    if context is not None and needed > context:
        raise ConfigurationError(
            f"max_new_tokens={max_new_tokens} and the longest prompt of {prompt_tokens} tokens do not fit a "
            f"context of {context} tokens: lower max_new_tokens to at most {context - prompt_tokens}, or drop long "
            "prompts"
        )
    if max_model_len is not None or (context is not None and not single_turn):
        return context or needed
    return needed + _PROMPT_ROOM if context is None else min(context, needed + _PROMPT_ROOM)


def _characters(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(str(message.get("content", ""))) for message in prompt)
