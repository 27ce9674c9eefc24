"""The endpoint as clients meet it: OpenAI's own package, plain HTTP, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.worker import http_server
from lightning_rft.explorer.workflows.endpoint import Endpoint
from lightning_rft.sampling import Sampling
from tests.explorer.served import Scripted, Served, served

openai = pytest.importorskip("openai")

USER = {"role": "user", "content": "1+1"}
ASK: dict[str, Any] = {"model": "policy", "messages": [USER]}
DEADLINE_S = 60


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture
def serve(tiny_model_path: Path, tokenizer: Any) -> Callable[..., None]:
    """Runs a coroutine with an endpoint over an engine."""

    def run(test: Callable[[Served], Coroutine[Any, Any, None]], engine: Engine | None = None) -> None:
        async def main() -> None:
            async with served(tiny_model_path, engine or Scripted(), tokenizer) as parts:
                await asyncio.wait_for(test(parts), DEADLINE_S)

        asyncio.run(main())

    return run


def address(endpoint: Endpoint) -> tuple[str, int]:
    host, _, port = endpoint.base_url.removeprefix("http://").removesuffix("/v1").partition(":")
    return host, int(port)


@asynccontextmanager
async def line(endpoint: Endpoint) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the endpoint."""
    reader, writer = await asyncio.open_connection(*address(endpoint))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def request(
    endpoint: Endpoint, body: Any = ASK, path: str = "/v1/chat/completions", method: str = "POST", **headers: Any
) -> bytes:
    """A request as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"authorization": f"Bearer {endpoint.api_key}", "content-length": len(data), "host": "x"} | headers
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in named.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


async def response(reader: asyncio.StreamReader) -> tuple[int, Any]:
    """Status and JSON body of a response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


async def asked(endpoint: Endpoint, *arguments: Any, **headers: Any) -> tuple[int, Any]:
    """The response to one request."""
    async with line(endpoint) as (reader, writer):
        writer.write(request(endpoint, *arguments, **headers))
        return await response(reader)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.002)


def test_three_clients(serve: Callable[..., None]) -> None:
    async def test(parts: Served) -> None:
        policy = parts.policy()
        endpoint = policy.endpoint()

        def in_a_thread() -> str | None:
            with openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
                assert [model.id for model in client.models.list()] == ["policy"]
                content: str | None = client.chat.completions.create(**ASK).choices[0].message.content
                return content

        assert await asyncio.to_thread(in_a_thread) == "ok"
        async with endpoint.openai() as client:
            said = await client.chat.completions.create(**ASK, logprobs=True, extra_body={"return_token_ids": True})
            stream = await client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
            chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "ok"
        assert chunks[-1].usage.completion_tokens == 4
        sync, whole, streamed = policy.turns
        assert said.choices[0].token_ids == whole.token_ids.tolist() == streamed.token_ids.tolist()
        assert said.prompt_token_ids == sync.prompt_ids.tolist()
        assert [token.logprob for token in said.choices[0].logprobs.content] == whole.logprobs.tolist()
        assert not +policy.counts and policy.drift == 0

    serve(test)


def test_ten_turns_of_a_client_that_sends_its_history_as_text(serve: Callable[..., None], tokenizer: Any) -> None:
    async def test(parts: Served) -> None:
        policy = parts.policy()
        messages: list[dict[str, Any]] = [USER]
        lost = 0
        async with policy.endpoint().openai() as client:
            for turn in range(10):
                said = await client.chat.completions.create(
                    model="policy", messages=messages, max_tokens=40, extra_body={"return_token_ids": True}
                )
                content, ids = said.choices[0].message.content, said.choices[0].token_ids
                lost += tokenizer(content)["input_ids"] != ids
                assert policy.turns[-1].token_ids.tolist() == ids
                messages += [{"role": "assistant", "content": content}, {"role": "user", "content": f"and {turn}?"}]
        assert lost >= 5  # special tokens have no text: what is decoded and encoded again is something else
        assert [turn.parent for turn in policy.turns] == [None, *range(9)] and policy.drift == 0
        for before, after in zip(policy.turns, policy.turns[1:], strict=False):
            assert after.extends(before)

    serve(test, FakeEngine(mean_tokens=20, vocab_size=len(tokenizer)))


def test_texts_and_token_ids(serve: Callable[..., None], tokenizer: Any) -> None:
    async def test(parts: Served) -> None:
        policy = parts.policy()
        endpoint = policy.endpoint()
        async with endpoint.openai() as client:
            said = await client.completions.create(model="policy", prompt="1+1=", logprobs=0, stop=["k"])
            again = await client.completions.create(model="policy", prompt=[10, 11], stream=True)
            text = "".join([chunk.choices[0].text async for chunk in again])
        assert (said.choices[0].text, said.choices[0].finish_reason, text) == ("o", "stop", "ok")
        assert said.choices[0].logprobs.token_logprobs == [-0.5] * 3
        status, answer = await asked(endpoint, {"token_ids": [10, 11]}, "/inference/v1/generate")
        assert (status, answer["choices"][0]["token_ids"]) == (200, policy.turns[2].token_ids.tolist())
        assert tokenizer.decode(policy.turns[0].prompt_ids) == "1+1="
        assert [turn.prompt_ids.tolist() for turn in policy.turns[1:]] == [[10, 11]] * 2

    serve(test)


def test_the_run_says_how_is_sampled(serve: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    async def test(parts: Served) -> None:
        policy = parts.policy(sampling=Sampling(8, 0.7))
        async with policy.endpoint().openai() as client:
            for temperature in (0.0, 0.7, 0.2):
                await client.chat.completions.create(**ASK, temperature=temperature, seed=5, max_tokens=4)
        assert {round(turn.temperature, 3) for turn in policy.turns} == {0.7}
        assert +policy.counts == {"endpoint_temperature": 3}

    engine = Scripted()
    with caplog.at_level("WARNING"):
        serve(test, engine)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "A client asked the endpoint for temperature=0.0, seed=5"
    ]
    assert {request.sampling.max_new_tokens for request in engine.asked} == {4}
    assert 5 not in {request.sampling.seed for request in engine.asked}


def test_refusals_are_openais(serve: Callable[..., None]) -> None:
    async def test(parts: Served) -> None:
        policy = parts.policy(max_model_len=40)
        refused: list[tuple[str | None, str | None]] = []
        async with policy.endpoint().openai(max_retries=0) as client:
            for body in (
                {"n": 2},
                {"frequency_penalty": 0.5},
                {"max_tokens": 100},
                {"max_tokens": 0},
                {"response_format": {"type": "json_object"}},
                {"logit_bias": {"5": 1}},
                {"logprobs": True, "top_logprobs": 2},
                {"messages": [USER] * 2, "extra_body": {"messages": 3}},
            ):
                with pytest.raises(openai.BadRequestError) as error:
                    await client.chat.completions.create(**ASK | {"max_tokens": 4} | body)
                refused.append((error.value.param, error.value.code))
            assert refused == [
                ("n", "unsupported_parameter"),
                ("frequency_penalty", "unsupported_parameter"),
                ("messages", "context_length_exceeded"),
                ("max_tokens", None),
                ("response_format", None),  # in training it needs top_k beside it
                ("logit_bias", None),
                ("top_logprobs", "unsupported_parameter"),
                ("messages", None),
            ]
            assert not policy.turns and +policy.counts == {"endpoint_refused": len(refused)}
        kept = parts.policy(sampling=Sampling(8, 0.7, top_k=4))
        async with kept.endpoint().openai() as client:
            said = await client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
        (first, *_) = said.choices[0].logprobs.content
        assert len(first.top_logprobs) == 2

    serve(test, FakeEngine())


def test_another_api_of_openais_is_refused_at_once(serve: Callable[..., None]) -> None:
    """Responses, which some agents use if nobody tells them otherwise; the error names the paths that there are."""
    paths = "/v1/chat/completions, /v1/completions, /inference/v1/generate, /v1/models"

    async def test(parts: Served) -> None:
        policy = parts.policy()
        endpoint = policy.endpoint()
        body = {"model": "policy", "input": "1+1"}
        for method, path in (("POST", "/v1/responses"), ("GET", "/v1/responses/resp_1"), ("DELETE", "/v1/responses/1")):
            status, answer = await asked(endpoint, body, path, method)
            assert status == 404 and answer["error"] == {
                "message": f"no such path: {path}; there are {paths}",
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
        async with endpoint.openai() as client:  # which would try again for long if there were a reason to
            for stream in (False, True):
                with pytest.raises(openai.NotFoundError, match="no such path: /v1/responses; there are /v1/chat/comp"):
                    await client.responses.create(model="policy", input="1+1" * 10**5, stream=stream)
        assert not policy.turns and +policy.counts == {"endpoint_refused": 5}

    serve(test)


def test_keys(serve: Callable[..., None]) -> None:
    engine = Scripted()

    async def test(parts: Served) -> None:
        ending, staying = parts.policy(), parts.policy()
        first, second = ending.endpoint(), staying.endpoint()
        assert first.api_key not in repr(first) and first.api_key != ending.endpoint().api_key
        engine.gate.clear()
        async with first.openai(max_retries=0) as client, second.openai(max_retries=0) as other:
            running = asyncio.ensure_future(client.chat.completions.create(**ASK))
            theirs = asyncio.ensure_future(other.chat.completions.create(**ASK))
            await until(lambda: len(engine.asked) == 2)
            ending.close()
            with pytest.raises(openai.AuthenticationError, match="the sample of this API key has ended"):
                await running
            engine.gate.set()
            assert (await theirs).choices[0].message.content == "ok"
            with pytest.raises(openai.AuthenticationError, match="the sample of this API key has ended"):
                await client.chat.completions.create(**ASK)
        assert (len(ending.turns), len(staying.turns), len(engine.asked)) == (0, 1, 2)
        for key in ("", "rft-0-00", first.api_key[:-1], f"{first.api_key}0", "rft-\xff", "none"):
            status, body = await asked(second, authorization=f"Bearer {key}")
            assert (status, body["error"]["type"]) == (401, "authentication_error")
            assert "unknown API key" in body["error"]["message"], key

    serve(test, engine)


def test_a_client_that_retries_by_itself_is_not_sampled_twice(serve: Callable[..., None]) -> None:
    engine = Scripted()

    async def test(parts: Served) -> None:
        policy = parts.policy()
        endpoint = policy.endpoint()
        connections = 0

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """Passes a request on, and loses the first response."""
            nonlocal connections
            connections += 1
            lost = connections == 1
            async with line(endpoint) as (answers, requests):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                requests.write(head + await reader.readexactly(length))
                answer = await answers.readuntil(b"\r\n\r\n") + await answers.read(2**20)
            if not lost:
                writer.write(answer)
                await writer.drain()
            writer.close()

        proxy = await asyncio.start_server(forward, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}/v1"
        async with proxy, Endpoint(address, endpoint.api_key).openai(max_retries=2) as client:
            said = await client.chat.completions.create(**ASK)
        assert said.choices[0].message.content == "ok" and connections == 2
        assert len(policy.turns) == len(engine.asked) == 1
        assert +policy.counts == {"endpoint_retries": 1}

    serve(test, engine)


def test_a_client_that_hangs_up_ends_its_call(serve: Callable[..., None]) -> None:
    engine = Scripted()

    async def test(parts: Served) -> None:
        policy = parts.policy()
        endpoint = policy.endpoint()
        engine.gate.clear()
        async with line(endpoint) as (_, writer):
            writer.write(request(endpoint))
            await until(lambda: engine.has_work)
        await until(lambda: not engine.has_work)
        engine.gate.set()
        assert (await asked(endpoint))[0] == 200
        assert len(policy.turns) == 1 and not +policy.counts

    serve(test, engine)


def test_malformed_requests(serve: Callable[..., None]) -> None:
    async def test(parts: Served) -> None:
        endpoint = parts.policy().endpoint()
        chat = "/v1/chat/completions"
        for body, path, method, status in (
            (b"{", chat, "POST", 400),
            (b"\xff\xfe", chat, "POST", 400),
            (b"[" * 100_000, chat, "POST", 400),
            (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', chat, "POST", 400),
            (b"", chat, "POST", 400),
            (b"7", chat, "POST", 400),
            (b"{}", chat, "POST", 400),
            (b"", chat, "GET", 405),
            (b"", "/v1/models", "POST", 405),
            (b"{}", "/v1/embeddings", "POST", 404),
            (b" " * (http_server._MOST_BYTES + 1), chat, "POST", 413),
        ):
            got, answer = await asked(endpoint, body, path, method)
            assert (got, answer["error"]["type"]) == (status, "invalid_request_error"), body[:20]
            assert answer["error"]["message"]
        async with line(endpoint) as (reader, writer):
            writer.write(b"no HTTP\r\n\r\n")
            assert (await reader.read(20)).startswith(b"HTTP/1.0 400")
        assert (await asked(endpoint, x_stainless_retry_count="many"))[0] == 200

    serve(test)


def test_slow_clients_have_a_deadline(serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_READ_S", 0.2)
    monkeypatch.setattr(http_server, "_WRITE_S", 0.2)

    async def test(parts: Served) -> None:
        policy = parts.policy(sampling=Sampling(200_000, 0.7), max_model_len=10**6)
        endpoint = policy.endpoint()
        async with line(endpoint) as (reader, writer):
            writer.write(request(endpoint)[:-5])
            status, answer = await response(reader)
            assert status == 408 and "did not arrive" in answer["error"]["message"]
        server = parts.endpoints._server
        assert server is not None
        server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that no buffer takes all of it
        with socket.socket() as reads_nothing:
            reads_nothing.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reads_nothing.connect(address(endpoint))
            reads_nothing.sendall(request(endpoint, ASK | {"logprobs": True}))
            await until(lambda: bool(policy.turns) and not server._http.connections)
        assert len(policy.turns) == 1  # sampled, and an answer for a retry
        monkeypatch.setattr(http_server, "_WRITE_S", 30.0)
        assert (await asked(endpoint, ASK | {"logprobs": True}, x_stainless_retry_count=1))[0] == 200
        assert len(policy.turns) == 1

    serve(test, Scripted(lambda prompt: "x" * 5_000))


def test_sixty_four_sessions_among_clients_that_misbehave(serve: Callable[..., None]) -> None:
    turns = 3
    engine = Scripted(lambda prompt: prompt.rpartition("<|user|>")[2].partition("<|end|>")[0])  # says it again

    async def misbehaves(endpoints: list[Endpoint], ended: Endpoint, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            endpoint = rng.choice(endpoints)
            async with line(endpoint) as (reader, writer):
                kind = rng.randrange(5)
                if kind == 0:
                    writer.write(request(endpoint)[: rng.randrange(1, 200)])
                elif kind == 1:
                    writer.write(request(ended))
                    assert (await response(reader))[0] == 401
                elif kind == 2:
                    writer.write(request(endpoint, authorization="Bearer no"))
                    assert (await response(reader))[0] == 401
                elif kind == 3:
                    writer.write(request(endpoint, b"{" * rng.randrange(1, 1000)))
                    assert (await response(reader))[0] == 400
                else:
                    writer.write(request(endpoint, b" " * (http_server._MOST_BYTES // 8), "/v1/nothing"))
                await asyncio.sleep(0)

    async def converses(endpoint: Endpoint, name: str) -> list[list[int]]:
        messages: list[dict[str, Any]] = []
        ids = []
        async with endpoint.openai(max_retries=0) as client:
            for turn in range(turns):
                messages.append({"role": "user", "content": f"{name}, {turn}"})
                said = await client.chat.completions.create(
                    model="policy", messages=messages, extra_body={"return_token_ids": True}
                )
                assert said.choices[0].message.content == f"{name}, {turn}"
                messages.append({"role": "assistant", "content": said.choices[0].message.content})
                ids.append(said.choices[0].token_ids)
        return ids

    async def test(parts: Served) -> None:
        policies = [parts.policy() for _ in range(64)]
        endpoints = [policy.endpoint() for policy in policies]
        gone = parts.policy()
        ended = gone.endpoint()
        gone.close()
        others = asyncio.gather(*(misbehaves(endpoints, ended, seed) for seed in range(16)))
        answers = await asyncio.gather(*(converses(one, f"s{index}") for index, one in enumerate(endpoints)))
        await others
        for policy, ids in zip(policies, answers, strict=True):
            assert [turn.token_ids.tolist() for turn in policy.turns] == ids
            assert [turn.parent for turn in policy.turns] == [None, 0, 1] and policy.drift == 0
        assert not gone.turns and len(engine.asked) == 64 * turns
        for policy in policies:
            policy.close()
        assert not parts.endpoints._sessions

    serve(test, engine)


def test_an_engines_error_is_the_servers(serve: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    class Breaks(Scripted):
        def add(self, request: Any) -> None:
            raise RuntimeError("out of memory")

    async def test(parts: Served) -> None:
        status, body = await asked(parts.policy().endpoint())
        assert status == 500 and body["error"] == {
            "message": "RuntimeError: out of memory",
            "type": "server_error",
            "param": None,
            "code": None,
        }

    serve(test, Breaks())
    assert "out of memory" in caplog.text


def test_what_must_be_installed(serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(parts: Served) -> None:
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "vllm.entrypoints.openai.chat_completion.protocol", None)
            with pytest.raises(ConfigurationError, match=r"tool_parser='hermes'.*install lightning-rft\[vllm\]"):
                parts.policy().endpoint(tool_parser="hermes")
        with monkeypatch.context() as without:
            without.delitem(sys.modules, "lightning_rft.explorer.worker.http_server")
            without.setitem(sys.modules, "aiohttp", None)
            with pytest.raises(ConfigurationError, match=r"pip install .lightning-rft\[agents\]"):
                parts.policy().endpoint()
        endpoint = parts.policy().endpoint()
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "openai", None)
            with pytest.raises(ConfigurationError, match="pip install openai"):
                endpoint.openai()

    serve(test)
