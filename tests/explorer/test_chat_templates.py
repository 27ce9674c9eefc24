"""What chat templates put after an answer, in the ways of well-known models."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.workflows.policy import Policy, Reply
from lightning_rft.tasks.prompts import encode_later, encode_prompt
from tests.explorer.test_conversation import QUESTION, SYSTEM, Sampler, kept, make_policy, parents, user

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Qwen 3: the thinking of earlier turns is dropped, that of the last one kept
THINKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    "<|assistant|>{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ content }}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Llama 2: white space around everything, the beginning of the sequence with every user
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}<|unk|>[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} <|end|>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# A result must have a call before it, as in Mistral's
STRICT = (
    "{% set ns = namespace(called=false) %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if not ns.called %}{{ raise_exception('No call') }}{% endif %}[RESULT]{{ m.content }}[/RESULT]"
    "{% else %}{% set ns.called = m.tool_calls is defined %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{% for call in m.tool_calls or [] %}[CALL]{{ call.function }}{% endfor %}<|end|>"
    "{% endif %}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(tiny_model_path: Path) -> Any:
    """One whose chat template a test may change."""
    return AutoTokenizer.from_pretrained(tiny_model_path)


def second(tokenizer: Any, answer: str, message: str, *new: dict[str, Any], **ends: str) -> tuple[Policy, str]:
    """Asks twice; returns what the second prompt has behind the first answer."""
    sampler = Sampler(tokenizer, answer, **ends)
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        reply = await policy([QUESTION])
        assert reply == message
        await policy([QUESTION, reply.message, *new])

    asyncio.run(turns())
    return policy, tokenizer.decode(kept(sampler.requests[1], policy.turns[0]))


@pytest.mark.parametrize(
    ("template", "answer", "message", "rest"),
    [
        (CHATML, "ok<|end|>", "ok", "\n<|user|>\n2<|end|>\n<|assistant|>\n"),
        (CHATML, "ok\n<|end|>", "ok\n", "\n<|user|>\n2<|end|>\n<|assistant|>\n"),
        (CHATML, "ok<|pad|>", "ok", "<|end|>\n<|user|>\n2<|end|>\n<|assistant|>\n"),  # another end of a sequence
        (THINKS, "<think>Hm</think>\nok<|end|>", "<think>Hm</think>\nok", "<|user|>2<|end|><|assistant|>"),
        (LLAMA, " ok <|end|>", " ok ", "<|unk|>[INST] 2 [/INST]"),
        (LLAMA, " ok<|end|>", " ok", "<|unk|>[INST] 2 [/INST]"),
        (PLAIN, " ok<|end|>", " ok", "\nUser: 2\nAssistant:"),
    ],
)
def test_what_follows_an_answer(tokenizer: Any, template: str, answer: str, message: str, rest: str) -> None:
    tokenizer.chat_template = template
    policy, behind = second(tokenizer, answer, message, user("2"))
    assert behind == rest
    assert parents(policy) == [None, 0] and policy.drift == 0


@pytest.mark.parametrize(
    ("template", "rest"),
    [
        (CHATML, "<|end|>\n<|user|>\n2<|end|>\n<|assistant|>\n"),
        (THINKS, "<|end|><|user|>2<|end|><|assistant|>"),
        (LLAMA, " <|end|><|unk|>[INST] 2 [/INST]"),
        (PLAIN, "\nUser: 2\nAssistant:"),
    ],
)
def test_what_follows_an_answer_that_was_cut(tokenizer: Any, template: str, rest: str) -> None:
    tokenizer.chat_template = template
    _, behind = second(tokenizer, "ok", "ok", user("2"), finish_reason="length")
    assert behind == rest


def test_a_text_that_ended_the_answer_is_not_repeated(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    sampler = Sampler(tokenizer, " ok\nUser:")
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        reply = await policy([QUESTION], stop="\nUser:")
        assert reply == " ok"
        await policy([QUESTION, reply.message, user("2")])

    asyncio.run(turns())
    assert tokenizer.decode(sampler.requests[1].prompt_ids) == "User: 1+1\nAssistant: ok\nUser: 2\nAssistant:"
    assert policy.drift == 0


def test_other_answers_among_what_is_new_are_text(tokenizer: Any) -> None:
    said = {"role": "assistant", "content": "me"}
    _, behind = second(tokenizer, "ok<|end|>", "ok", said, said, SYSTEM)
    assert behind == "<|assistant|>me<|end|><|assistant|>me<|end|><|system|>Add.<|end|><|assistant|>"


def test_the_beginning_of_the_next_answer(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer)
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        messages = [QUESTION, (await policy([QUESTION])).message, user("2")]
        begun = {"role": "assistant", "content": "It is "}
        reply = await policy([*messages, begun])
        assert reply == "ok"
        assert reply.message["content"] == "It is ok"
        assert policy.messages == [*messages, reply.message]
        await policy([*policy.messages, user("3")])

    asyncio.run(turns())
    assert tokenizer.decode(kept(sampler.requests[1], policy.turns[0])) == "<|user|>2<|end|><|assistant|>It is "
    assert tokenizer.decode(kept(sampler.requests[2], policy.turns[1])) == "<|user|>3<|end|><|assistant|>"
    assert policy.drift == 0


@pytest.mark.parametrize(
    ("finish_reason", "more", "parent"),
    [("length", "", 0), ("length", ", so", 0), ("stop", "", None), ("stop", "!", None)],
)
def test_an_answer_may_be_continued(tokenizer: Any, finish_reason: str, more: str, parent: int | None) -> None:
    odd = (*tokenizer("ok")["input_ids"], tokenizer.unk_token_id, *tokenizer("!")["input_ids"])
    ended = (tokenizer.eos_token_id,) if finish_reason == "stop" else ()
    sampler = Sampler(tokenizer, (*odd, *ended), finish_reason=finish_reason)
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        reply = await policy([QUESTION])
        assert reply == "ok!"
        await policy([QUESTION, {"role": "assistant", "content": reply + more}])

    asyncio.run(turns())
    first, again = sampler.requests
    # without the end of the turn, since it goes on
    assert again.prompt_ids == (*first.prompt_ids, *odd, *encode_later(tokenizer, more))
    assert parents(policy) == [None, parent] and policy.drift == (parent is None)


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
AGAIN = {"id": "2", "type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": 1}}}


@pytest.mark.parametrize("template", [CHATML, STRICT])
@pytest.mark.parametrize(("sent", "drift"), [(CALL, 0), (AGAIN, 2)])
def test_tool_calls(tokenizer: Any, template: str, sent: dict[str, Any], drift: int) -> None:
    """The call is not rendered again, and its result is what is new, also where a template looks back at the call."""
    tokenizer.chat_template = "{# tools #}" + template
    sampler = Sampler(tokenizer, "[CALL]  add(1,2)<|end|>")
    policy = make_policy(sampler, tokenizer)
    result = {"role": "tool", "tool_call_id": "1", "content": "3"}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

    async def turns() -> None:
        reply = await policy([QUESTION], tools=tools)
        reply.message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [sent]}, result]
        reply = await policy(messages, tools=tools)
        await policy([*messages, reply.message, user("2")], tools=tools)

    asyncio.run(turns())
    assert parents(policy) == [None, 0, 1]
    result_text = "\n<|tool|>\n3<|end|>\n<|assistant|>\n" if template == CHATML else "[RESULT]3[/RESULT]"
    assert tokenizer.decode(kept(sampler.requests[1], policy.turns[0])) == result_text
    user_text = "\n<|user|>\n2<|end|>\n<|assistant|>\n" if template == CHATML else "[INST]2[/INST]"
    assert tokenizer.decode(kept(sampler.requests[2], policy.turns[1])) == user_text
    assert policy.drift == min(drift, 1)  # the third prompt repeats the second as it was sent


def test_what_was_called_and_thought_tells_conversations_apart(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer, "o<|unk|>k<|end|>")  # as text, ok
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        reply = await policy([QUESTION])
        reply.message = {"role": "assistant", "content": "ok", "tool_calls": [CALL]}
        for arguments in ('{"a": 1, "b": 3}', '{"a": 1}', "a"):
            function = {"name": "add", "arguments": arguments}
            await policy([QUESTION, {**reply.message, "tool_calls": [{"function": function}]}, user("2")])
        await policy([QUESTION, {**reply.message, "reasoning": "Hm"}, user("2")])
        reply.message = {**reply.message, "reasoning": "Ah"}
        await policy([QUESTION, {**reply.message, "reasoning": "Hm"}, user("2")])

    asyncio.run(turns())
    texts = [tokenizer.decode(request.prompt_ids) for request in sampler.requests]
    assert [text.count("ok") for text in texts] == [0, 1, 1, 1, 0, 1]
    assert [text.count("o<|unk|>k") for text in texts] == [0, 0, 0, 0, 1, 0]
    assert policy.drift == 0


def test_a_template_without_a_place_for_tools_is_refused(tokenizer: Any) -> None:
    policy = make_policy(Sampler(tokenizer), tokenizer)
    with pytest.raises(ConfigurationError, match="no place for tools"):
        asyncio.run(policy([QUESTION], tools=[{"type": "function", "function": {"name": "add"}}]))


@pytest.mark.parametrize(
    ("template", "new"),
    [
        ("{% for m in messages[-1:] %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>", user("2")),
        ("{% for m in messages %}{{ m.content | upper }}<|end|>{% endfor %}", user("2")),
        (CHATML, user("What does <<the-answer-was-here>> mean?")),
    ],
    ids=["shows the last message", "changes the content", "the mark is in a message"],
)
def test_where_a_template_does_not_tell_all_is_encoded_and_counted(
    tokenizer: Any, template: str, new: dict[str, Any]
) -> None:
    tokenizer.chat_template = template
    sampler = Sampler(tokenizer)
    policy = make_policy(sampler, tokenizer)

    async def turns() -> Reply:
        reply = await policy([QUESTION])
        return await policy([QUESTION, reply.message, new])

    asyncio.run(turns())
    assert policy.messages is not None
    assert sampler.requests[1].prompt_ids == encode_prompt(tokenizer, policy.messages[:-1])
    assert policy.drift == 1


def test_text_in_front_of_which_a_tokenizer_puts_a_space(tokenizer: Any) -> None:
    """As Llama's does at the beginning of a text, and not within it."""

    class Spaces:
        eos_token, eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            return tokenizer(text if text.startswith("<|") else f" {text}")

    assert tokenizer.decode(encode_later(Spaces(), "Hi")) == "Hi"
    assert tokenizer.decode(encode_later(Spaces(), "<|user|>")) == "<|user|>"
