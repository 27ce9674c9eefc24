"""The specification of an explorer: everything that it is told when it starts, and how long its context must be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.explorer.workflows.policy import Workflow
from lightning_rft.model_folder import Pretrained
from lightning_rft.pickling import dumps
from lightning_rft.settings import Timeouts, Tolerance
from lightning_rft.tasks.prompts import encode_prompt, encode_prompts, ends_open, is_rendered

__all__ = ["ExplorerSpec", "check_travels", "fitting_length", "longest_prompt"]

_log = logging.getLogger(__name__)

_MOST_MEASURED = 10_000  # tasks; tokenising more would take minutes
_AT_ONCE = 1_000
_PROMPT_ROOM = 128


@dataclass(frozen=True)
class ExplorerSpec:
    """Everything that an explorer is told when it starts."""

    engine: Engine
    model: Pretrained
    workflow: Workflow
    #: None: the workflow says what a sample earned.
    reward: Callable[..., Any] | None
    #: Maximum tokens of prompt and answer together.
    max_model_len: int
    seed: int
    tolerance: Tolerance
    timeouts: Timeouts


def check_travels(**settings: Any) -> None:
    """Raises :class:`ConfigurationError` if a setting's value cannot be sent to another process."""
    for setting, value in settings.items():
        try:
            dumps(value)
        except Exception as error:  # pickling runs any object's own code
            name = getattr(value, "__qualname__", type(value).__qualname__)
            raise ConfigurationError(
                f"{setting} cannot be sent to an explorer process ({name}: {error}): keep open files, locks, models "
                "and connections out of it, or create them where they are used"
            ) from error


def fitting_length(
    model: Pretrained,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int,
    max_model_len: int | None,
    single_turn: bool,
    template: Mapping[str, Any] | None = None,
) -> int:
    """Maximum tokens of prompt and answer together that engines are made for.

    Where a prompt gets one answer and the tasks are known and not too many, that is what the prompts need; else the
    model's context. A prompt that does not fit is shown, and costs its task alone.

    Args:
        model: What will be loaded.
        tasks: All that will be asked; empty if they are not known.
        max_new_tokens: Maximum tokens per answer.
        max_model_len: What the engine's description says, which is then the result.
        single_turn: Whether a prompt gets one answer; else turns may fill the model's context.
        template: Variables of the chat template.

    Raises:
        ConfigurationError: There is no config or tokenizer, its chat template is missing or refuses a task's messages,
            or no prompt fits.
    """
    model.config()  # a model that cannot be loaded is to fail here, before any process starts
    tokenizer = model.tokenizer()
    context = max_model_len or model.context_length()
    lengths = _lengths(tokenizer, tasks, template) if len(tasks) <= _MOST_MEASURED else []
    fitting = [length for length in lengths if context is None or length + max_new_tokens <= context]
    if context is not None and len(fitting) < len(lengths):
        _say_too_long(tasks, lengths, context, max_new_tokens, named=max_model_len is not None, any_fits=bool(fitting))
    if max_model_len is not None:
        return max_model_len
    if context is None and not fitting:
        raise ConfigurationError(
            f"model={model.name!r} does not say how long its context is: set the engine's max_model_len"
        )
    if context is not None and not (fitting and single_turn):
        return context
    needed = max(fitting) + max_new_tokens + _PROMPT_ROOM
    return needed if context is None else min(context, needed)


def longest_prompt(max_model_len: int, max_new_tokens: int) -> int:
    """Tokens of the longest prompt if :func:`fitting_length` knew them all, else of the longest that fits."""
    return max(1, max_model_len - max_new_tokens - _PROMPT_ROOM)


def _lengths(tokenizer: Any, tasks: Sequence[Task], template: Mapping[str, Any] | None) -> list[int]:
    """Tokens of each task's prompt; says once what is done to some of them."""
    lengths: list[int] = []
    for start in range(0, len(tasks), _AT_ONCE):
        some = tasks[start : start + _AT_ONCE]
        try:
            lengths += map(len, encode_prompts(tokenizer, [task.prompt for task in some], template))
        except ConfigurationError:
            for task in some:  # to find which
                try:
                    encode_prompt(tokenizer, task.prompt, template)
                except ConfigurationError as error:
                    raise ConfigurationError(f"task {task.id!r}: {error}") from error
            raise
    open_ended = next((task for task in tasks if ends_open(task.prompt)), None)
    if open_ended is not None:
        _log.warning("task %r ends with a message of the assistant, which the answer continues", open_ended.id)
    rendered = next((task for task in tasks if is_rendered(tokenizer, task.prompt)), None)
    if rendered is not None:
        _log.warning("task %r begins with %r as text, so that none is added", rendered.id, tokenizer.bos_token)
    return lengths


def _say_too_long(
    tasks: Sequence[Task], lengths: Sequence[int], context: int, max_new_tokens: int, *, named: bool, any_fits: bool
) -> None:
    """Shows the tasks that do not fit a context, or raises if none does."""
    index, longest = max(enumerate(lengths), key=lambda item: item[1])
    way_out = "shorten or drop it" + (", or raise the engine's max_model_len" if named else "")
    if any_fits:
        count = sum(length + max_new_tokens > context for length in lengths)
        _log.warning(
            "%d of %d prompts and max_new_tokens=%d do not fit a context of %d tokens, so these tasks will fail; the "
            "longest, of task %r, has %d tokens: %s",
            *(count, len(tasks), max_new_tokens, context, tasks[index].id, longest, way_out),
        )
    elif min(lengths) > context:
        raise ConfigurationError(
            f"a prompt of {longest} tokens is longer than the context of {context} tokens: {way_out}"
        )
    else:
        raise ConfigurationError(
            f"max_new_tokens={max_new_tokens} and the shortest prompt of {min(lengths)} tokens do not fit a context of "
            f"{context} tokens: lower max_new_tokens to at most {context - min(lengths)}"
        )
