"""Unmodified agents against a live endpoint: the turns of a sample are their calls, token for token, in one line."""

from __future__ import annotations

import asyncio
import importlib
import json
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.workflows.endpoint import Endpoint
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.sampling import Sampling
from tests.explorer.served import Scripted, Served, served

openai = pytest.importorskip("openai")

ROOM = {"max_model_len": 10**6}
IDS = {"return_token_ids": True}


def steps(*answers: str) -> Scripted:
    """A model that gives these answers, one for each turn of a conversation."""
    return Scripted(lambda prompt: answers[prompt.count("<|assistant|>") - 1])


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def parsers() -> None:
    """Imports vLLM's, which warns of what torch has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("vllm.entrypoints.openai.chat_completion.protocol")
        importlib.import_module("vllm.parser")


@pytest.fixture
def live(tiny_model_path: Path) -> Callable[..., Any]:
    """Runs a coroutine with an endpoint over a model."""

    def run(test: Callable[[Served], Coroutine[Any, Any, Any]], engine: Scripted) -> Any:
        async def main() -> Any:
            tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
            tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
            async with served(tiny_model_path, engine, tokenizer) as parts:
                return await asyncio.wait_for(test(parts), 120)

        return asyncio.run(main())

    return run


class Heard:
    """The token ids of the answers that a client received."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []

    def note(self, response: Any) -> None:
        response.read()
        self.ids.append(response.json()["choices"][0]["token_ids"])

    async def anote(self, response: Any) -> None:
        await response.aread()
        self.note(response)

    def are_the_turns_of(self, policy: Policy, number: int) -> None:
        turns = policy.turns
        assert [turn.token_ids.tolist() for turn in turns] == self.ids and len(turns) == number
        assert [turn.parent for turn in turns] == [None, *range(number - 1)] and policy.drift == 0


def test_smolagents(live: Callable[..., Any]) -> None:
    smolagents = pytest.importorskip("smolagents")
    sums: list[tuple[int, int]] = []

    class Add(smolagents.Tool):  # type: ignore[misc, name-defined]
        name, description, output_type = "add", "Adds two numbers.", "integer"
        inputs = {name: {"type": "integer", "description": "A number."} for name in ("a", "b")}  # noqa: RUF012

        def forward(self, a: int, b: int) -> int:
            sums.append((a, b))
            return a + b

    def runs(endpoint: Endpoint, heard: Heard) -> Any:
        with openai.DefaultHttpxClient(event_hooks={"response": [heard.note]}) as client:
            model = smolagents.OpenAIModel(
                "policy",
                endpoint.base_url,
                api_key=endpoint.api_key,
                client_kwargs={"http_client": client},
                extra_body=IDS,
            )
            return smolagents.CodeAgent([Add()], model, max_steps=5, verbosity_level=0).run("What is 2+3+10?")

    async def test(parts: Served) -> Any:
        policy, heard = parts.policy(sampling=Sampling(500, 1.0), **ROOM), Heard()
        answer = await asyncio.to_thread(runs, policy.endpoint(), heard)
        heard.are_the_turns_of(policy, 3)
        return answer

    first = "I add.\n<code>\nx = add(2, 3)\nprint(x)\n</code>"
    second = "Again.\n<code>\ny = add(x, 10)\nprint(y)\n</code>"
    assert live(test, steps(first, second, "Done.\n<code>\nfinal_answer(y)\n</code>")) == 15
    assert sums == [(2, 3), (5, 10)]


@pytest.mark.vllm
@pytest.mark.usefixtures("parsers")
def test_pydantic_ai(live: Callable[..., Any]) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    sums: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        sums.append((a, b))
        return a + b

    async def test(parts: Served) -> Any:
        policy, heard = parts.policy(sampling=Sampling(500, 1.0), **ROOM), Heard()
        http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [heard.anote]})
        async with policy.endpoint(tool_parser="hermes").openai(http_client=http) as client:
            model = OpenAIChatModel("policy", provider=OpenAIProvider(openai_client=client))
            agent = pydantic_ai.Agent(model, tools=[add], model_settings={"extra_body": IDS})
            answer = (await agent.run("What is 2+3+10?")).output
        heard.are_the_turns_of(policy, 3)
        return answer

    assert live(test, steps(called("add", a=2, b=3), called("add", a=5, b=10), "It is 15.")) == "It is 15."
    assert sums == [(2, 3), (5, 10)]


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A tool.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
    for name in ("double", "halve")
]


@pytest.mark.vllm
@pytest.mark.usefixtures("parsers")
def test_a_loop_of_ones_own_with_parallel_calls_in_a_stream(live: Callable[..., Any]) -> None:
    async def test(parts: Served) -> None:
        policy, heard = parts.policy(sampling=Sampling(500, 1.0), **ROOM), Heard()
        messages: list[Any] = [{"role": "user", "content": "Double 4, halve 6."}]
        async with policy.endpoint(tool_parser="hermes").openai() as client:
            stream = await client.chat.completions.create(
                model="policy", messages=messages, tools=TOOLS, stream=True, extra_body=IDS
            )
            calls, content = {}, ""
            async for chunk in stream:
                (choice,) = chunk.choices
                heard.ids += [choice.token_ids] if choice.model_extra and "token_ids" in choice.model_extra else []
                content += choice.delta.content or ""
                for call in choice.delta.tool_calls or ():
                    assert call.function is not None
                    calls[call.index] = call
            assert choice.finish_reason == "tool_calls"
            assert [call.function.name for call in calls.values()] == ["double", "halve"]
            spelled = [  # not as they came: in a spelling and with ids of the client's own
                {
                    "id": f"call_{index}",
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments.replace(" ", "")},
                }
                for index, call in calls.items()
            ]
            messages.append({"role": "assistant", "content": content, "tool_calls": spelled})
            messages += [{"role": "tool", "tool_call_id": f"call_{index}", "content": "8"} for index in calls]
            said = await client.chat.completions.create(
                model="policy", messages=messages, tools=TOOLS, tool_choice="none", extra_body=IDS
            )
        heard.ids.append(said.choices[0].token_ids)
        assert said.choices[0].message.content == called("double", a=1)  # as text: the client wanted no calls
        heard.are_the_turns_of(policy, 2)

    live(test, steps(f"Both.\n{called('double', a=4)}\n{called('halve', a=6)}", called("double", a=1)))


@pytest.mark.vllm
@pytest.mark.usefixtures("parsers")
def test_what_a_parser_cannot_read_stays_text(live: Callable[..., Any]) -> None:
    broken = '<tool_call>{"name": "double", "arg'

    async def test(parts: Served) -> None:
        policy = parts.policy(sampling=Sampling(500, 1.0, top_k=8), **ROOM)
        with pytest.raises(ConfigurationError, match=r"tool_parser='nothing'.*--tool-call-parser"):
            policy.endpoint(tool_parser="nothing")
        with pytest.raises(ConfigurationError, match=r"reasoning_parser='deepseek_r1'"):  # its tokens are not known
            policy.endpoint(reasoning_parser="deepseek_r1")
        async with policy.endpoint(tool_parser="hermes").openai() as client:
            ask = {"model": "policy", "messages": [{"role": "user", "content": "Double 4."}], "tools": TOOLS}
            auto = await client.chat.completions.create(**ask)
            forced = await client.chat.completions.create(**ask, tool_choice="required")
        for said in (auto, forced):
            assert (said.choices[0].message.content, said.choices[0].message.tool_calls) == (broken, None)
            assert said.choices[0].finish_reason == "stop"
        assert +policy.counts == {"endpoint_unparsed": 1}  # vLLM's parser gives the text by itself

    live(test, Scripted(lambda prompt: broken))


@pytest.mark.vllm
@pytest.mark.usefixtures("parsers")
def test_reasoning(live: Callable[..., Any], tiny_model_path: Path) -> None:
    async def test(parts: Served) -> None:
        parts.tokenizer.add_tokens(["<think>", "</think>"])
        policy = parts.policy(sampling=Sampling(500, 1.0), **ROOM)
        messages: list[Any] = [{"role": "user", "content": "1+1"}]
        async with policy.endpoint(reasoning_parser="deepseek_r1").openai() as client:
            first = await client.chat.completions.create(model="policy", messages=messages)
            message = first.choices[0].message
            assert (message.content, message.reasoning_content) == ("2", "One more.")
            messages += [{"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}]
            await client.chat.completions.create(model="policy", messages=messages)
        assert [turn.parent for turn in policy.turns] == [None, 0] and policy.drift == 0

    live(test, Scripted(lambda prompt: "One more.</think>2"))
