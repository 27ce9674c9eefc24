"""The endpoint of an explorer: one for all its samples, and gone with it."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.experience import Task
from lightning_rft.explorer.messages import Explored
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.settings import Timeouts
from tests.explorer.test_worker import GROUP, answers

openai = pytest.importorskip("openai")


def test_samples_of_an_explorer_share_an_endpoint_that_ends_with_it(tiny_model_path: Path) -> None:
    addresses, late = [], []

    async def workflow(task: Task, policy: Policy) -> str:
        endpoint = policy.endpoint()
        addresses.append(endpoint.base_url)
        client = endpoint.openai(max_retries=0)
        ask: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": "1+1"}], "temperature": 0.5}
        first = (await client.chat.completions.create(**ask)).choices[0].message
        ask["messages"] += [{"role": "assistant", "content": first.content}, {"role": "user", "content": "Sure?"}]
        second = (await client.chat.completions.create(**ask)).choices[0].message

        async def goes_on() -> None:
            while True:
                try:
                    await client.chat.completions.create(**ask)
                except openai.AuthenticationError as error:
                    late.append(error.message)
                    return

        asyncio.get_running_loop().call_soon(asyncio.ensure_future, goes_on())
        while policy.turns[2:] == ():
            await asyncio.sleep(0)
        return str(second.content)

    (explored,) = answers(tiny_model_path, GROUP, workflow=workflow, max_model_len=400)
    assert isinstance(explored, Explored) and not explored.failures
    for experience in explored.experiences:
        assert experience.turns[1].parent == 0 and len(experience.turns) >= 3
        assert experience.metrics == {
            "drift": 0.0,
            "endpoint_refused": 0.0,
            "endpoint_retries": 0.0,
            "endpoint_temperature": float(len(experience.turns)),
            "endpoint_unparsed": 0.0,
        }
    assert len(set(addresses)) == 1 and len(addresses) == 2
    assert all("has ended" in message for message in late)
    host, _, port = addresses[0].removeprefix("http://").removesuffix("/v1").partition(":")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((host, int(port)), timeout=5)


def test_a_sample_that_is_cut_short_does_not_take_the_endpoint_along(tiny_model_path: Path) -> None:
    tries = []

    async def workflow(task: Task, policy: Policy) -> str:
        endpoint = policy.endpoint()  # in the first try, this starts the server
        tries.append(endpoint.base_url)
        async with endpoint.openai(max_retries=0) as client:
            said = await client.completions.create(model="policy", prompt="1+1")
        if len(tries) == 1:
            await asyncio.Event().wait()
        return str(said.choices[0].text)

    limits = Timeouts(reward_s=30.0, workflow_s=3.0)
    (explored,) = answers(tiny_model_path, replace(GROUP, seeds=(7,)), workflow=workflow, timeouts=limits)
    assert not explored.failures and len(explored.experiences) == 1
    assert len(tries) == 2 and len(set(tries)) == 1


def test_an_agent_that_comes_to_the_end_of_the_context_ends_with_its_last_answer(tiny_model_path: Path) -> None:
    async def workflow(task: Task, policy: Policy) -> str:
        messages: list[dict[str, Any]] = [{"role": "user", "content": "1+1"}]
        async with policy.endpoint().openai(max_retries=0) as client:
            while True:
                try:
                    said = await client.chat.completions.create(model="policy", messages=messages)
                except openai.BadRequestError as error:
                    raise RuntimeError("an agent's own") from error
                answer = {"role": "assistant", "content": said.choices[0].message.content}
                messages += [answer, {"role": "user", "content": "Sure?"}]

    (explored,) = answers(tiny_model_path, GROUP, workflow=workflow, max_model_len=100)
    assert not explored.failures and explored.retried == 0
    for experience in explored.experiences:
        last = experience.turns[-1]
        assert len(experience.turns) > 1 and len(last.prompt_ids) + last.num_tokens > 60
        assert experience.metrics["endpoint_refused"] == 1.0
