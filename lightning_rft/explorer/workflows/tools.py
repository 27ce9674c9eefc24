"""The workflow in which the model calls plain Python functions until it answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from lightning_rft.errors import ConfigurationError, ContextFull
from lightning_rft.experience import Task
from lightning_rft.explorer.worker.users_code import in_time
from lightning_rft.explorer.workflows.own_thread import OwnThread
from lightning_rft.explorer.workflows.policy import Policy, Reply
from lightning_rft.explorer.workflows.tool_calls import (
    Call,
    NamedParser,
    Parse,
    as_calls,
    as_text,
    call_message,
    error_text,
    hermes,
    protocol,
    schema_of,
    takes_tools,
)
from lightning_rft.scores import Answer
from lightning_rft.tasks.prompts import plain_message

__all__ = ["Conversation", "Tools", "as_messages", "check_limits", "schemas_of"]

_log = logging.getLogger(__name__)

Functions = Mapping[str, Callable[..., Any]]


class Tools:
    """A workflow in which the model calls tools, until it answers without a call.

    A tool is a plain Python function, or an ``async`` one. The model is told of its arguments by their type hints, and
    of what it does by its docstring in Google's style. Plain functions run in threads, and the calls of one answer run
    at the same time. What a tool returns is the model's next input: text as it is, other values as JSON. A tool that
    raises or takes too long, an unknown name and arguments that do not fit give the model an error to read, and cost
    the sample nothing; they are counted.

    If the tokenizer's chat template knows tools, it presents them and their results. If not, a system message tells the
    model to write ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

    The sample's answer is the last one of the model, which the data module's reward scores. ``rft/workflow_tool_calls``
    and ``rft/workflow_tool_errors`` are logged.

    Args:
        functions: The tools; import paths in a config.
        max_turns: Maximum answers of the model in a sample; the last one may be a call.
        timeout_s: Seconds that a call of a tool may take.
        parser: How calls are found in an answer. Left out: as Hermes and Qwen write them,
            ``<tool_call>{...}</tool_call>``. A name of vLLM's ``--tool-call-parser``, or a function
            ``parse(answer) -> (content, [(name, arguments), ...])``, which is given a :class:`Reply`.

    Raises:
        ConfigurationError: A function has no docstring, an argument has no type hint or no line in it, two have one
            name, or a number is out of range.

    Example::

        from encyclopedia import search  # async def search(words: str) -> str, with a docstring that has `Args:`

        data = RFTDataModule(tasks=tasks, reward=rft.rewards.last_number, workflow=rft.Tools([search]))
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        max_turns: int = 8,
        timeout_s: float = 30.0,
        parser: str | Parse | None = None,
    ) -> None:
        check_limits("Tools", max_turns, timeout_s)
        self.functions = {getattr(function, "__name__", ""): function for function in functions}
        if not functions or len(self.functions) < len(functions):
            raise ConfigurationError("Tools(functions=...) needs one or more functions, each with a name of its own")
        self.schemas = schemas_of(self.functions)
        self.max_turns = max_turns
        self.timeout_s = timeout_s
        self.parser = NamedParser(parser) if isinstance(parser, str) else parser
        self._blamed: set[str] = set()

    async def __call__(self, task: Task, policy: Policy) -> Answer:
        """Answers a task."""
        conversation = Conversation(policy, self.schemas, self.parser)
        reply = await conversation.run(as_messages(task.prompt), self.max_turns, self._answers)
        return Answer(str(reply), metrics=conversation.metrics)

    async def _answers(self, calls: Sequence[Call]) -> list[tuple[str, bool]]:
        return await asyncio.gather(*map(self._answer, calls))

    async def _answer(self, call: Call) -> tuple[str, bool]:
        """What comes of a call, and whether it failed."""
        if call.problem:
            return f"Error: {call.problem}", True
        thread = OwnThread()
        try:
            work = thread.call(self.functions[call.name], **call.arguments)
            value = await in_time(work, self.timeout_s, f"{call.name} took longer than {self.timeout_s:g} s")
        except Exception as error:  # the model's to read, and perhaps the tool's fault
            if call.name not in self._blamed:
                self._blamed.add(call.name)
                _log.warning("tool %r failed, and may again: the model is told, and the sample goes on", call.name)
                _log.warning("arguments: %r", call.arguments, exc_info=error)
            return error_text(error), True
        finally:
            thread.end()
        return as_text(value), False


class Conversation:
    """A conversation in which the model calls tools."""

    def __init__(self, policy: Policy, schemas: Mapping[str, Any], parser: NamedParser | Parse | None) -> None:
        self.metrics = {"tool_calls": 0, "tool_errors": 0}
        self._policy = policy
        self._schemas = schemas
        if isinstance(parser, NamedParser):
            parser = parser.parse(policy, schemas.values())
        self._parse = parser or hermes

    async def run(
        self,
        messages: list[dict[str, Any]],
        max_turns: int,
        answers: Callable[[Sequence[Call]], Awaitable[list[tuple[str, bool]]]],
        ended: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """The model's last answer: without a call, of the last turn, before the context is full, or once ``ended``."""
        told = list(self._schemas.values())
        plainly = not takes_tools(self._policy.tokenizer, told)
        if plainly:
            messages = _with_system(messages, protocol(told))
        reply: Reply | None = None
        for _ in range(max_turns):
            try:
                reply = await self._policy(messages, tools=None if plainly else told)
            except ContextFull:
                if reply is None:
                    raise
                break
            content, parsed = self._parse(reply)
            calls = as_calls(parsed, self._schemas)
            if not calls or (reply.finish_reason == "length" and all(call.problem for call in calls)):
                break  # where an answer was cut off, so was its last call
            first_id = self.metrics["tool_calls"]
            results = await answers(calls)
            self.metrics["tool_calls"] += len(calls)
            self.metrics["tool_errors"] += sum(failed for _, failed in results)
            texts = [text for text, _ in results]
            if plainly:
                told_back = "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts)
                messages = [*messages, reply.message, {"role": "user", "content": told_back}]
            else:
                reply.message = call_message(content, calls, first_id)
                said = zip(reply.message["tool_calls"], texts, strict=True)
                messages = [*messages, reply.message, *(_result(call, text) for call, text in said)]
            if ended():
                break
        assert reply is not None, "there is at least one turn"
        return reply


def schemas_of(functions: Functions) -> dict[str, Any]:
    """JSON schemas of functions by their names."""
    return {name: schema_of(function) for name, function in functions.items()}


def as_messages(prompt: Any) -> list[dict[str, Any]]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]


def check_limits(workflow: str, max_turns: int, timeout_s: float) -> None:
    """Raises ConfigurationError for a workflow that could do nothing."""
    if max_turns < 1:
        raise ConfigurationError(f"{workflow}(max_turns={max_turns}) must be at least 1")
    if not timeout_s > 0:
        raise ConfigurationError(f"{workflow}(timeout_s={timeout_s}) must be above 0")


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    first = plain_message(messages[0])
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]


def _result(call: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": text}
