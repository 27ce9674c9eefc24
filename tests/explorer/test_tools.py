"""``Tools``: what the model is told, which calls are made, and what cannot go wrong for a sample."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_rft.errors import ConfigurationError, ContextFull
from lightning_rft.experience import Experience, Task
from lightning_rft.explorer.workflows.own_thread import OwnThread
from lightning_rft.explorer.workflows.tool_calls import as_calls, hermes, problem_of, schema_of
from lightning_rft.explorer.workflows.tools import Tools
from lightning_rft.pickling import dumps
from tests.explorer.scripted import TEMPLATE_WITH_TOOLS, Script, scripted_policy


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def look_up(word: str) -> dict[str, str]:
    """Finds a word.

    Args:
        word: The word.
    """
    await asyncio.sleep(0)
    return {"word": word, "means": "ü"}


def fail(how: str) -> None:
    """Fails.

    Args:
        how: In which way.
    """
    if how == "exit":
        sys.exit(3)
    if how == "surrogate":
        raise ValueError("\ud800")
    raise KeyError(how)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def plain(tiny_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture(scope="module")
def knowing(tiny_model_path: Path) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.chat_template = TEMPLATE_WITH_TOOLS
    return tokenizer


def converse(tokenizer: Any, tools: Tools, answers: list[str], prompt: Any = "1+1?", **settings: Any) -> Any:
    script = Script(tokenizer, answers, settings.pop("cut", False))
    policy = scripted_policy(tokenizer, script, **settings)
    answer = asyncio.run(tools(Task(prompt), policy))
    assert policy.drift == 0
    parents = [turn.parent for turn in policy.turns]
    assert parents == [None, *range(len(parents) - 1)], "one conversation is one line of tokens"
    Experience("task", 0, policy.turns, 0.0)
    return answer, script.prompts, policy


def test_a_template_that_knows_tools_presents_them(knowing: Any) -> None:
    tools = Tools([add, look_up])
    asked = "I look." + call("add", a=1) + call("look_up", word="x")
    answer, prompts, policy = converse(knowing, tools, [asked, "2"])
    assert (answer.text, answer.metrics) == ("2", {"tool_calls": 2, "tool_errors": 0})
    assert prompts[0] == (
        f"<|system|>{json.dumps(schema_of(add))}{json.dumps(schema_of(look_up))}<|end|><|user|>1+1?<|end|><|assistant|>"
    )
    after = '<|user|>2<|end|><|user|>{"word": "x", "means": "'
    assert prompts[1].startswith(f"{prompts[0]}{asked}<|end|>{after}")  # the tokenizer knows no ü
    question, said, first, second, last = policy.messages
    assert question["role"] == "user" and last["content"] == "2"
    assert said["content"] == "I look."
    assert [one["function"] for one in said["tool_calls"]] == [
        {"name": "add", "arguments": {"a": 1}},
        {"name": "look_up", "arguments": {"word": "x"}},
    ]
    assert [one["id"] for one in said["tool_calls"]] == [first["tool_call_id"], second["tool_call_id"]]
    assert (first["role"], first["name"], first["content"]) == ("tool", "add", "2")


def test_a_template_without_tools_is_told_in_plain_text(plain: Any) -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    prompt = [system, {"role": "user", "content": "1+1?"}]
    answer, prompts, policy = converse(plain, Tools([add]), [call("add", a=1), "2"], prompt)
    assert answer.text == "2"
    assert prompts[0].startswith("<|system|>Be brief.\n\nYou can call these tools:\n" + '{"name": "add", ')
    assert prompts[0].count("<|system|>") == 1 and prompt[0] is system and len(system["content"]) == 1
    response = "<|user|><tool_response>\n2\n</tool_response><|end|><|assistant|>"
    assert prompts[1] == f"{prompts[0]}{call('add', a=1)}<|end|>{response}"
    assert policy.messages[2] == {"role": "assistant", "content": call("add", a=1)}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (call("fail", how="now"), "Error: KeyError: 'now'"),
        (call("fail", how="exit"), "Error: RuntimeError: a workflow or reward raised SystemExit"),
        (call("fail", how="surrogate"), "Error: ValueError: ?"),
        (call("subtract", a=1), "Error: there is no tool 'subtract', only add, fail"),
        (call("add"), "Error: argument 'a' is missing"),
        (call("add", a="1"), "Error: argument 'a' is '1', not {\"type\": \"integer\"}"),
        (call("add", a=True), "Error: argument 'a' is True"),
        (call("add", a=1, c=2), "Error: there is no argument 'c', only a, b"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "Error: the arguments are no JSON object"),
        ('<tool_call>{"name": "add", "arguments": "{"}</tool_call>', "Error: the arguments are no JSON object"),
        ("<tool_call>add(1, 2)</tool_call>", 'Error: a call is a JSON object with "name" and "arguments"'),
        ('<tool_call>{"arguments": {}}', 'Error: a call is a JSON object with "name"'),
    ],
)
def test_what_goes_wrong_is_the_models_to_read(
    knowing: Any, plain: Any, asked: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # xdist cannot send half a character on
    for tokenizer in (knowing, plain):
        answer, prompts, _ = converse(tokenizer, Tools([add, fail]), [asked, "ok"])
        assert answer.text == "ok" and answer.metrics == {"tool_calls": 1, "tool_errors": 1}
        assert told in prompts[1].removeprefix(prompts[0])


def test_a_tool_that_hangs_ends_with_its_deadline_and_what_it_started_too(knowing: Any) -> None:
    freed = threading.Event()
    programs: list[subprocess.Popen[bytes]] = []

    def wait() -> None:
        """Waits for ever."""
        freed.wait()

    def run() -> None:
        """Runs a program that does not end."""
        programs.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        programs[0].wait()

    async def sleep() -> None:
        """Sleeps."""
        await asyncio.sleep(1000)

    from lightning_rft.explorer.worker.users_code import note_programs

    before = subprocess.Popen.__init__
    note_programs()
    began = time.monotonic()
    try:
        asked = call("wait") + call("run") + call("sleep") + call("add", a=1)
        answer, prompts, _ = converse(knowing, Tools([wait, run, sleep, add], timeout_s=1.0), [asked, "ok"])
    finally:
        freed.set()
        subprocess.Popen.__init__ = before  # type: ignore[method-assign]
    assert time.monotonic() - began < 10  # together, not one after another
    assert answer.metrics == {"tool_calls": 4, "tool_errors": 3}
    assert prompts[1].count("took longer than 1 s<|end|>") == 3 and "<|user|>2<|end|>" in prompts[1]
    assert programs[0].wait(10) != 0
    programs[0].stdin.close()  # type: ignore[union-attr]


def test_the_last_turn_may_be_a_call(knowing: Any) -> None:
    answer, prompts, _ = converse(knowing, Tools([add], max_turns=2), [call("add", a=n) for n in range(3)])
    assert len(prompts) == 2
    assert answer.text == call("add", a=1) and answer.metrics["tool_calls"] == 2


def test_a_full_context_ends_the_sample_with_its_last_answer(knowing: Any) -> None:
    def read() -> str:
        """Reads a long page."""
        return "x" * 400

    tools = Tools([read])
    answer, prompts, _ = converse(knowing, tools, [call("read"), "never"], max_model_len=500)
    assert len(prompts) == 1 and answer.text == call("read")
    with pytest.raises(ContextFull):
        converse(knowing, tools, [], max_model_len=120)


def test_an_answer_that_was_cut_off_in_a_call_is_the_last(knowing: Any) -> None:
    answer, prompts, _ = converse(knowing, Tools([add]), [call("add", a=1)[:-15], "never"], cut=True)
    assert len(prompts) == 1 and answer.metrics == {"tool_calls": 0, "tool_errors": 0}
    answer, prompts, _ = converse(knowing, Tools([add]), [call("add", a=1) + "and", "2"], cut=True)
    assert len(prompts) == 2


def test_a_parser_of_ones_own(knowing: Any) -> None:
    def parse(answer: Any) -> tuple[str, list[tuple[str, Any]]]:
        word, _, argument = answer.partition(" ")
        assert answer.raw_text == f"{answer}<|end|>"
        return ("", [("add", '{"a": %s}' % argument)]) if word == "ADD" else (answer, [])  # noqa: UP031

    answer, prompts, _ = converse(knowing, Tools([add], parser=parse), ["ADD 41", "42!"])
    assert answer.text == "42!" and prompts[1].endswith("<|user|>42<|end|><|assistant|>")


def no_docstring(a: int) -> int:
    return a


def no_hint(a) -> int:  # type: ignore[no-untyped-def]
    """Has no hint.

    Args:
        a: A number.
    """
    return a


def no_line(a: int) -> int:
    """Has no line for a."""
    return a


def positional(a: int, /) -> int:
    """Has no names.

    Args:
        a: A number.
    """
    return a


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tools([no_docstring]), "tool 'no_docstring': .* no docstring.* type hints of its arguments"),
        (lambda: Tools([no_hint]), "tool 'no_hint': Argument a is missing a type hint"),
        (lambda: Tools([no_line]), "tool 'no_line': .* no description for the argument 'a'"),
        (lambda: Tools([positional]), "tool 'positional' cannot be called by name"),
        (lambda: Tools([lambda: 1]), "tool '<lambda>' cannot be called by name"),
        (lambda: Tools([]), "one or more functions"),
        (lambda: Tools([add, copy.copy(add)]), "each with a name of its own"),
        (lambda: Tools([add], max_turns=0), r"Tools\(max_turns=0\) must be at least 1"),
        (lambda: Tools([add], timeout_s=0), r"Tools\(timeout_s=0\) must be above 0"),
    ],
)
def test_what_cannot_be_a_tool_is_said_at_once(make: Callable[[], Tools], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_it_crosses_to_another_process_with_functions_of_a_notebook(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec("def twice(a: int) -> int:\n    '''Doubles.\n\n    Args:\n        a: It.\n    '''\n    return 2 * a", names)
    packed = tmp_path / "tools.pkl"
    packed.write_bytes(dumps(Tools([names["twice"]])))
    child = "import pickle, sys; tools = pickle.load(open(sys.argv[1], 'rb')); print(tools.functions['twice'](4))"
    done = subprocess.run([sys.executable, "-c", child, packed], capture_output=True, text=True, check=False)
    assert done.stdout == "8\n", done.stderr


@pytest.mark.usefixtures("no_seed_left_behind")
def test_a_config_names_them(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_rft.cli import RFTCLI

    monkeypatch.setattr(sys, "argv", ["lightning-rft"])

    settings = {"functions": ["tests.explorer.test_tools.add", "tests.explorer.test_tools.look_up"], "max_turns": 3}
    tools = {"class_path": "lightning_rft.Tools", "init_args": settings}
    data = {"tasks": ["1+1"], "reward": "tests.processes.share_of_letters", "engine": "FakeEngine", "workflow": tools}
    model = {"model": str(tiny_model_path)}
    made = RFTCLI(args={"model": model, "data": data, "trainer": {"logger": False}}, run=False).datamodule.workflow
    assert made.functions["add"](1, 2) == 3 and [*made.functions] == ["add", "look_up"] and made.max_turns == 3
    data["workflow"] = {
        "class_path": "lightning_rft.Environment",
        "init_args": {"factory": "tests.explorer.test_environment.Door", "action": "builtins.int"},
    }
    made = RFTCLI(args={"model": model, "data": data, "trainer": {"logger": False}}, run=False).datamodule.workflow
    assert made.factory.__name__ == "Door" and made.action is int


def test_calls_run_one_after_another_on_one_thread_which_ends() -> None:
    async def several() -> tuple[list[int], list[int]]:
        thread, order = OwnThread(), []

        def note(index: int) -> int:
            order.append(index)
            return threading.get_ident()

        idents = await asyncio.gather(*(thread.call(note, index) for index in range(20)))
        thread.end()
        return order, idents

    before = threading.active_count()
    order, idents = asyncio.run(several())
    assert order == [*range(20)] and len({*idents}) == 1 != idents[0] and threading.get_ident() not in idents
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline


TEXTS = st.text('ab<>{}"\\\n/:,', max_size=3)  # no others, whose table takes long to make
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


NAMED = st.tuples(st.text("abc", min_size=1, max_size=3), st.dictionaries(TEXTS, VALUES, max_size=3))


@settings(max_examples=30, deadline=None)
@given(st.lists(NAMED, max_size=3))
def test_what_is_written_as_a_call_is_read_as_one(calls: list[tuple[str, dict[str, Any]]]) -> None:
    written = "So: " + "\n".join(call(name, **arguments) for name, arguments in calls)
    content, parsed = hermes(written)
    assert parsed == calls and content == ("So:" if calls else written)


@given(st.text('<>tool_call{}/":, namerguments1', max_size=60))
def test_no_text_breaks_the_parser(text: str) -> None:
    for written in (text, f"<tool_call>{text}", f"<tool_call>{{{text}</tool_call>"):
        _, parsed = hermes(written)
        calls = as_calls(parsed, {"add": schema_of(add)})
        assert all(one.problem or one.name == "add" for one in calls)
        json.dumps([one.arguments for one in calls])


PARAMETERS = st.sampled_from(["size", "names", "how", "scale", "other"])


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(PARAMETERS, VALUES | st.sampled_from(["up", ["x"]])))
def test_arguments_that_fit_are_those_that_the_hints_allow(arguments: dict[str, Any]) -> None:
    def resize(size: int | None, names: list[str], how: Literal["up", 2] = "up", scale: float = 1.0) -> None:
        """Resizes.

        Args:
            size: Size.
            names: Names.
            how: How.
            scale: Scale.
        """

    def right(name: str, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return {
            "size": value is None or (number and isinstance(value, int)),
            "names": isinstance(value, list) and all(isinstance(one, str) for one in value),
            "how": value in ("up", 2),
            "scale": number,
        }.get(name, False)

    fits = {"size", "names"} <= arguments.keys() and all(right(*item) for item in arguments.items())
    assert (not problem_of(arguments, schema_of(resize)["function"]["parameters"])) == fits


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # of what torch has deprecated, when vLLM's parsers are imported
def test_a_parser_of_vllms(knowing: Any) -> None:
    asked = "I look." + call("add", a=1) + call("look_up", word="x")
    answer, _, policy = converse(knowing, Tools([add, look_up], parser="hermes"), [asked, "2"])
    assert (answer.text, answer.metrics) == ("2", {"tool_calls": 2, "tool_errors": 0})
    assert [one["function"]["arguments"] for one in policy.messages[1]["tool_calls"]] == [{"a": 1}, {"word": "x"}]
    with pytest.raises(ConfigurationError, match="tool_parser='nope'"):
        converse(knowing, Tools([add], parser="nope"), [])
