"""OpenAI's dialect: what requests come down to, what is refused, and what answers look like to OpenAI's own types."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_rft.explorer.worker.openai_messages import answer_message
from lightning_rft.explorer.worker.openai_requests import (
    Call,
    Refusal,
    chat_call,
    completion_call,
    generate_call,
    plain_message,
)
from lightning_rft.explorer.worker.openai_responses import chat_answer, completion_answer, generate_answer, stream
from lightning_rft.explorer.workflows.reply import Reply
from lightning_rft.turn import Support, Turn

types = pytest.importorskip("openai.types")

USER = {"role": "user", "content": "1+1"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path)


def chat(**body: Any) -> Call:
    return chat_call({"messages": [USER], "model": "policy"} | body)


def chosen(call: Call) -> dict[str, Any]:
    return {setting: value for setting, (_, value) in call.settings.items()}


def test_what_a_client_leaves_out_is_the_runs() -> None:
    call = chat(max_tokens=None, stop=None, tools=None, temperature=None, stream=False, user="me", metadata={"a": "b"})
    assert call == Call([USER], {}, "policy", {}, prompt_name="messages")


def test_settings_of_a_call_under_our_names() -> None:
    call = chat(
        max_tokens=5, max_completion_tokens=7, stop="\n", min_tokens=2, logit_bias={"17": -100}, stop_token_ids=[3]
    )
    assert call.settings == {
        "max_new_tokens": ("max_completion_tokens", 7),
        "min_new_tokens": ("min_tokens", 2),
        "stop": ("stop", "\n"),
        "stop_token_ids": ("stop_token_ids", [3]),
        "logit_bias": ("logit_bias", {17: -100}),
    }
    assert chosen(chat(max_tokens=5, stop=["a", "b"])) == {"max_new_tokens": 5, "stop": ["a", "b"]}
    assert chosen(chat(chat_template_kwargs={"enable_thinking": False})) == {
        "chat_template_kwargs": {"enable_thinking": False}
    }


def test_how_to_answer() -> None:
    call = chat(
        stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2, return_token_ids=True
    )
    assert (call.stream, call.usage, call.logprobs, call.token_ids) == (True, True, 2, True)
    assert chat(logprobs=True).logprobs == 0
    assert chat(logprobs=False).logprobs is None


def test_how_the_run_samples_is_not_the_clients_to_say() -> None:
    call = chat(temperature=0.0, top_p=0.9, seed=3, extra="ignored")
    assert call.replaced == {"temperature": 0.0, "top_p": 0.9, "seed": 3} and not call.settings


def test_answers_of_a_form() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    call = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert call.settings == {"structured": ("response_format", {"json": schema})}
    assert chosen(chat(response_format={"type": "json_object"})) == {"structured": {"json": {"type": "object"}}}
    assert not chat(response_format={"type": "text"}).settings
    assert chosen(chat(structured_outputs={"regex": "[0-9]", "json": None})) == {"structured": {"regex": "[0-9]"}}


def test_tools() -> None:
    call = chat(tools=[ADD | {"strict": True}])
    assert call.tools == [ADD | {"strict": True}]  # as they were given: the template shows them
    assert (call.tool_choice, call.parallel, call.settings) == ("auto", True, {})
    assert chat(tools=[ADD], tool_choice="none").tools == [ADD]  # the conversation's beginning stays as it is
    required = chat(tools=[ADD, NOW], tool_choice="required", parallel_tool_calls=False)
    structured = chosen(required)["structured"]["json"]
    assert structured["maxItems"] == structured["minItems"] == 1 and not required.parallel
    assert [one["properties"]["name"] for one in structured["items"]["anyOf"]] == [{"const": "add"}, {"const": "now"}]
    named = chat(tools=[ADD, NOW], tool_choice={"type": "function", "function": {"name": "add"}})
    assert named.settings["structured"] == ("tool_choice", {"json": ADD["function"]["parameters"]})  # type: ignore[index]
    assert (named.tool_choice, named.tool_name) == ("named", "add")


def test_messages_are_as_templates_take_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    said = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}]},
            {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "user", "content": "ok", "name": "me", "tool_calls": None},
        ]
    ).prompt
    assert said == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "user", "content": "ok", "name": "me"},
    ]
    assert plain_message(said[1]) == said[1]
    broken = plain_message({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]})
    assert broken["tool_calls"][0]["function"]["arguments"] == "[1"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_what_is_refused_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        chat(**body)
    error = refused.value.body["error"]
    assert (refused.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert error["message"]


def test_what_changes_nothing_is_no_reason_to_refuse() -> None:
    chat(n=1, presence_penalty=0, frequency_penalty=0.0, repetition_penalty=1.0, echo=False, modalities=["text"])


def test_completions() -> None:
    call = completion_call({"prompt": "x", "max_tokens": 3, "logprobs": 0, "stop": ["."]})
    assert (call.prompt, call.logprobs, chosen(call)) == ("x", 0, {"max_new_tokens": 3, "stop": ["."]})
    assert completion_call({"prompt": [5, 6]}).prompt == (5, 6)
    assert completion_call({"prompt": [[5, 6]]}).prompt == (5, 6)
    assert completion_call({"prompt": ["x"]}).prompt == "x"
    refused = [({"prompt": "x", "echo": True}, "echo"), ({"prompt": "x", "best_of": 2}, "best_of"), ({}, "prompt")]
    for body, param in [*refused, ({"prompt": ["x", "y"]}, "prompt[0]"), ({"prompt": []}, "prompt")]:
        with pytest.raises(Refusal) as error:
            completion_call(body)
        assert error.value.body["error"]["param"] == param


def test_tokens_in() -> None:
    sampling = {
        "temperature": 0.5,
        "max_tokens": 16,
        "stop_token_ids": [2],
        "logprobs": 1,
        "skip_special_tokens": False,
    }
    call = generate_call({"model": "policy", "token_ids": [5, 6], "sampling_params": sampling})
    assert (call.prompt, call.logprobs, call.replaced) == ((5, 6), 0, {"temperature": 0.5})
    assert call.settings["max_new_tokens"] == ("sampling_params.max_tokens", 16)
    for body, param in [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [5], "sampling_params": {"n": 2}}, "sampling_params.n"),
        ({"token_ids": [5], "sampling_params": {"max_tokens": 0.5}}, "sampling_params.max_tokens"),
        ({"token_ids": [5], "stream": True}, "stream"),
    ]:
        with pytest.raises(Refusal) as error:
            generate_call(body)
        assert error.value.body["error"]["param"] == param


KEYS = st.sampled_from(
    [
        *("model", "messages", "prompt", "token_ids", "role", "content", "type", "text", "tools", "function", "name"),
        *("parameters", "tool_choice", "stop", "n", "seed", "max_tokens", "logit_bias", "stream", "stream_options"),
        *("response_format", "json_schema", "schema", "sampling_params", "logprobs", "7"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["user", "function", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(body=VALUES | st.dictionaries(KEYS, VALUES, max_size=8))
def test_any_body_is_a_call_or_refused(body: Any) -> None:
    whole = {"messages": [USER], "prompt": "x", "token_ids": [1]} | body if isinstance(body, dict) else body
    for asked, read in product((body, whole), (chat_call, completion_call, generate_call)):
        try:
            assert isinstance(read(asked), Call)
        except Refusal as refusal:
            json.dumps(refusal.body)


def reply(tokenizer: Any, text: str = "ok", support: Support | None = None) -> Reply:
    ids = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
    logprobs = [-(index + 1) / 4 for index in range(len(ids))]
    turn = Turn((7, 8), ids, logprobs, [0] * len(ids), "stop", support=support)
    return Reply(text, turn, ids, 9, "", tokenizer)


def test_a_chat_answer_is_one_of_openais(tokenizer: Any) -> None:
    said, call = reply(tokenizer), chat(logprobs=True, return_token_ids=True)
    answer = chat_answer(call, said, answer_message(call, said, None, ()), tokenizer)
    whole = types.chat.ChatCompletion.model_validate(answer, strict=True)
    (choice,) = whole.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("ok", "assistant", "stop")
    assert [token.token for token in choice.logprobs.content] == ["o", "k", "<|end|>"]
    assert [token.logprob for token in choice.logprobs.content] == [-0.25, -0.5, -0.75]
    assert (whole.prompt_token_ids, choice.token_ids) == ([7, 8], list(said.token_ids))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (2, 3, 5)


def test_a_stream_says_the_same(tokenizer: Any) -> None:
    text = '[{"name": "add", "parameters": {"a": 1}}]'
    said, call = reply(tokenizer, text), chat(tools=[ADD], tool_choice="required", return_token_ids=True, logprobs=True)
    answer = chat_answer(call, said, answer_message(call, said, None, ()), tokenizer)
    *events, end = stream(answer, usage=True).decode().removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    chunks = [types.chat.ChatCompletionChunk.model_validate_json(one.removeprefix("data: ")) for one in events]
    first, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and not first.choices[0].finish_reason
    (called,) = first.choices[0].delta.tool_calls
    assert (called.index, called.function.name, called.function.arguments) == (0, "add", '{"a": 1}')
    assert first.choices[0].token_ids == list(said.token_ids) and first.prompt_token_ids == [7, 8]
    assert last.choices[0].finish_reason == "tool_calls" == answer["choices"][0]["finish_reason"]
    assert usage.choices == [] and usage.usage.total_tokens == answer["usage"]["total_tokens"]
    assert b'"usage"' not in stream(answer, usage=False)


def test_a_text_answer_is_one_of_openais(tokenizer: Any) -> None:
    support = Support([2, 1, 2], [5, 6, 7, 8, 9], [-1.0, -0.25, -0.5, -0.75, -2.0])
    said, call = reply(tokenizer, support=support), completion_call({"prompt": "x", "logprobs": 1})
    answer = completion_answer(call, said, {}, tokenizer)
    (choice,) = types.Completion.model_validate(answer, strict=True).choices
    assert (choice.text, choice.finish_reason, choice.logprobs.tokens) == ("ok", "stop", ["o", "k", "<|end|>"])
    assert choice.logprobs.text_offset == [0, 1, 2]
    top = {6: -0.25, 7: -0.5, 8: -0.75}
    assert choice.logprobs.top_logprobs == [{tokenizer.decode([token]): logprob} for token, logprob in top.items()]
    event, *_ = stream(answer, usage=False).split(b"\n\n")
    chunk = types.Completion.model_validate_json(event.removeprefix(b"data: "))
    assert chunk.choices[0].text == "ok"


def test_tokens_out(tokenizer: Any) -> None:
    said, call = reply(tokenizer), generate_call({"token_ids": [7, 8], "sampling_params": {"logprobs": 1}})
    (choice,) = generate_answer(call, said, {}, tokenizer)["choices"]
    assert choice["token_ids"] == [token["token_id"] for token in choice["logprobs"]["content"]] == list(said.token_ids)
    assert [token["logprob"] for token in choice["logprobs"]["content"]] == [-0.25, -0.5, -0.75]


def test_calls_that_a_grammar_forced(tokenizer: Any) -> None:
    named = chat(tools=[ADD], tool_choice={"type": "function", "function": {"name": "add"}})
    first, again = (answer_message(named, reply(tokenizer, '{"a": 1}'), None, ()) for _ in range(2))
    assert first == again  # ids of calls repeat from run to run: some templates show them
    (call,) = first["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'} and first["content"] is None
    assert len(call["id"]) == 9 and call["id"].isalnum()
    with pytest.raises(ValueError, match="Expecting"):
        answer_message(named, reply(tokenizer, '{"a":'), None, ())  # cut by max_tokens
