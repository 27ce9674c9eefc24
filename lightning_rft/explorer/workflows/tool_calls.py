"""Calls of tools in an answer, and the messages that tell a model of tools and of what came of its calls."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.explorer.workflows.reply import Reply

__all__ = [
    *("Call", "NamedParser", "Parse", "Schema", "as_calls", "as_text", "call_message", "error_text", "hermes"),
    *("problem_of", "protocol", "schema_of", "takes_tools"),
]

Schema = Mapping[str, Any]
Parse = Callable[[Reply], tuple[str, Iterable[tuple[str, Any]]]]

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_UNREADABLE = "unreadable"  # the name of what is no call, though it is written as one
_KINDS: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class Call(NamedTuple):
    """A call that the model asks for."""

    name: str
    arguments: dict[str, Any]
    problem: str = ""  # that keeps it from being made


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a tool, by transformers, from its signature and its docstring."""
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    name = getattr(function, "__name__", repr(function))
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if not name.isidentifier() or {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL} & {*kinds}:
        raise ConfigurationError(f"tool {name!r} cannot be called by name: give it a name, and its arguments too")
    try:
        return get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, NameError, ValueError) as error:
        raise ConfigurationError(
            f"tool {name!r}: {' '.join(map(str, error.args))} The model is told of a tool by the type hints of its "
            "arguments and by a docstring that has a line for each of them below `Args:`"
        ) from error


def hermes(text: str) -> tuple[str, list[tuple[str, Any]]]:
    r"""The text before the first call, and the calls of an answer in the form of Hermes and Qwen.

    Example:
        >>> hermes('Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>')
        ('Let me see.', [('add', {'a': 1, 'b': 2})])
    """
    calls: list[tuple[str, Any]] = []
    for found in _CALL.finditer(text):
        try:
            call = json.loads(found[1])
        except ValueError:
            call = None
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            calls.append((call["name"], call.get("arguments", call.get("parameters", {}))))
        else:
            calls.append(("", found[1].strip()))
    return (text.partition("<tool_call>")[0].strip() if calls else text), calls


class NamedParser:
    """The parser that vLLM has by a name; made with the first sample, since that takes longer than many an answer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._parser: Any = None

    def parse(self, policy: Policy, schemas: Iterable[Schema]) -> Parse:
        """Finds the calls in answers of a policy that was told of these tools."""
        from lightning_rft.explorer.worker.parsers import Parser

        self._parser = parser = self._parser or Parser(policy.tokenizer, self._name, None)
        tools, stop = list(map(dict, schemas)), policy.sampling.stop or ()

        def parse(reply: Reply) -> tuple[str, list[tuple[str, Any]]]:
            parsed = parser(reply, (stop,) if isinstance(stop, str) else stop, tools, "auto")
            return parsed.content or "", [(name, arguments) for _, name, arguments in parsed.calls]

        return parse


def as_calls(parsed: Iterable[tuple[str, Any]], schemas: Mapping[str, Schema]) -> list[Call]:
    """The calls that a parser has found, with what is wrong with each."""
    return [_as_call(name, arguments, schemas) for name, arguments in parsed]


def _as_call(name: str, given: Any, schemas: Mapping[str, Schema]) -> Call:
    if not name:
        return Call(_UNREADABLE, {"text": given}, 'a call is a JSON object with "name" and "arguments"')
    arguments = given
    if isinstance(given, str):  # as OpenAI's dialect has it
        try:
            arguments = json.loads(given or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        return Call(name, {"text": given}, "the arguments are no JSON object")
    call = Call(name, dict(arguments))
    if name not in schemas:
        return call._replace(problem=f"there is no tool {name!r}, only {', '.join(schemas)}")
    return call._replace(problem=problem_of(call.arguments, schemas[name]["function"]["parameters"]))


def problem_of(arguments: Mapping[str, Any], parameters: Schema) -> str:
    """What keeps arguments from fitting the schema of a tool's parameters; empty if nothing does."""
    known = parameters["properties"]
    for name in parameters.get("required", ()):
        if name not in arguments:
            return f"argument {name!r} is missing"
    for name, value in arguments.items():
        if name not in known:
            return f"there is no argument {name!r}, only {', '.join(known) or 'none'}"
        if not _fits(value, known[name]):
            return f"argument {name!r} is {value!r}, not {json.dumps(_told(known[name]))}"
    return ""


def _fits(value: Any, schema: Schema) -> bool:
    if value is None and schema.get("nullable"):
        return True
    if "enum" in schema:
        return value in schema["enum"]
    if "anyOf" in schema:
        return any(_fits(value, one) for one in schema["anyOf"])
    names = schema.get("type")
    if names is None:
        return True
    names = [names] if isinstance(names, str) else names
    if isinstance(value, bool) and "boolean" not in names:
        return False
    if not isinstance(value, tuple(kind for name in names for kind in _KINDS.get(name, (object,)))):
        return False
    return not isinstance(value, list) or "items" not in schema or all(_fits(one, schema["items"]) for one in value)


def _told(schema: Schema) -> Any:
    return schema["enum"] if "enum" in schema else {k: v for k, v in schema.items() if k != "description"}


def call_message(content: str, calls: Sequence[Call], first_id: int) -> dict[str, Any]:
    """The assistant's message that asks for calls; ids have the nine characters that some templates insist on."""
    asked = [
        {"type": "function", "id": f"call{first_id + index:05d}", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments, _) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": asked}


def as_text(value: Any) -> str:
    """What a tool or an environment returned, as the model reads it: text as it is, other values as JSON.

    Example:
        >>> as_text({"sum": 3}), as_text("3"), as_text(None)
        ('{"sum": 3}', '3', '')
    """
    if value is None:
        return ""
    if isinstance(value, dict | list | tuple):
        value = json.dumps(value, default=str, ensure_ascii=False)
    return str(value).encode(errors="replace").decode()  # half a character cannot be encoded


def error_text(error: Exception) -> str:
    """An error of a tool, as the model reads it."""
    return f"Error: {type(error).__name__}: {as_text(str(error))}"


def takes_tools(tokenizer: Any, schemas: Sequence[Schema]) -> bool:
    """Whether the chat template tells the model of tools."""
    if not tokenizer.chat_template:
        return False
    question = [{"role": "user", "content": "?"}]
    told, untold = (tokenizer.apply_chat_template(question, tools=some, tokenize=False) for some in (schemas, None))
    return bool(told != untold)


def protocol(schemas: Iterable[Schema]) -> str:
    """How a model whose chat template knows no tools is told of them."""
    tools = "\n".join(json.dumps(schema["function"]) for schema in schemas)
    return (
        f"You can call these tools:\n{tools}\n\nTo call one, write\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        "and stop. You are then told the result, between <tool_response> and </tool_response>. "
        "When you need no tool any more, answer without one."
    )
