"""What the endpoint costs beside the engine alone.

    python -m benchmarks.endpoint [--model runs/models/SmolLM2-135M-Instruct]

``FakeEngine`` samples, the tokenizer and chat template are a real model's, and a client in a process of its own holds
conversations of 10 turns with OpenAI's package, each turn with all of its history as text. ``milliseconds_per_call``:
processor time of an explorer's process for a call of one session, less that for the same request to the engine alone;
answers have 64 tokens. ``ratio_64``: tokens per second that the engine samples for 64 sessions at once, over what it
samples for 64 coroutines that call it directly; it is as fast as a GPU with 50 tokens per second for each of them, and
answers have 128 tokens in the mean. The two take turns. Writes ``benchmarks/results/endpoint.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import lightning_rft as rft
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.worker.endpoint import Endpoints
from lightning_rft.explorer.worker.stepper import Stepper
from lightning_rft.explorer.workflows.policy import Policy

RESULTS = Path(__file__).parent / "results"
TURNS, TOKENS, MEAN_TOKENS, SESSIONS, TOKENS_PER_SECOND = 10, 64, 128, 64, 50.0
CALLS, WINDOW_S, REPEATS = 200, 15.0, 3


class Counting(rft.FakeEngine):
    """Counts the tokens that it samples."""

    tokens = 0

    def step(self) -> list[Completion]:
        """Makes a step."""
        self.tokens += len(self._batch())
        return super().step()


class Served:
    """An engine, and policies that a client reaches."""

    def __init__(self, model: str, tokenizer: Any, **engine: Any) -> None:
        self.engine = Counting(model, vocab_size=len(tokenizer), **engine)
        self.stepper = Stepper(self.engine, asyncio.get_running_loop())
        self.endpoints = Endpoints()
        self._tokenizer = tokenizer
        self._policies: list[Policy] = []

    def policy(self, sampling: rft.Sampling) -> Policy:
        """Of one more sample."""
        number = len(self._policies)
        settings = {"name": str(number), "sampling": sampling, "max_model_len": 10**6, "seed": number}
        self._policies.append(
            Policy(self.stepper.sample, self._tokenizer, **settings, trained=False, serve=self.endpoints.open)
        )
        return self._policies[-1]

    def stop(self) -> None:
        """Ends all of it."""
        for policy in self._policies:
            policy.close()
        self.endpoints.stop()
        self.stepper.stop(10)


async def talk(client: Any, sample: Callable[[int], None]) -> None:
    """Holds conversations for ever."""
    while True:
        messages: list[dict[str, str]] = []
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"This is question {turn}. What is {turn} + {turn}?"})
            said = await client.chat.completions.create(model="policy", messages=messages)
            messages.append({"role": "assistant", "content": said.choices[0].message.content})
            sample(1)


async def client(addresses: list[tuple[str, str]], calls: int) -> None:
    """The other process: a conversation with each address, until so many calls are answered."""
    import openai

    left, done = calls, asyncio.Event()

    def count(answered: int) -> None:
        nonlocal left
        left -= answered
        if left == 0:
            done.set()

    clients = [openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) for url, key in addresses]
    talks = [asyncio.ensure_future(talk(one, count)) for one in clients]
    await asyncio.wait([*talks, ended := asyncio.ensure_future(done.wait())], return_when=asyncio.FIRST_COMPLETED)
    assert ended.done(), talks


@contextmanager
def other_process(policies: list[Policy], calls: int = -1) -> Iterator[subprocess.Popen[bytes]]:
    """Runs :func:`client`."""
    addresses = [(endpoint.base_url, endpoint.api_key) for endpoint in (policy.endpoint() for policy in policies)]
    asked = json.dumps([addresses, calls])
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.endpoint", "--client", asked])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def processor_time(served: Served) -> tuple[float, float]:
    """Seconds a call: through the endpoint, and of the engine alone."""
    sampling = rft.Sampling(TOKENS, 1.0, min_new_tokens=TOKENS)
    policy = served.policy(sampling)
    with other_process([policy], CALLS + TURNS) as process:
        while len(policy.replies) < TURNS:  # the first conversation imports what is needed
            await asyncio.sleep(0.01)
        began, first = time.process_time(), len(policy.replies)
        await asyncio.to_thread(process.wait, 600)
    through = (time.process_time() - began) / (len(policy.replies) - first)
    prompts = [tuple(reply.turn.prompt_ids.tolist()) for reply in policy.replies]
    requests = [Request(f"alone/{index}", ids, replace(sampling, seed=index)) for index, ids in enumerate(prompts)]
    began = time.process_time()
    for request in requests:
        await served.stepper.sample(request)
    return through, (time.process_time() - began) / len(requests)


async def tokens_per_second(served: Served) -> float:
    """Of the engine, in a window of time."""
    while served.engine.tokens < SESSIONS * MEAN_TOKENS * 2:  # all are under way, no longer in step
        await asyncio.sleep(0.1)
    began, before = time.monotonic(), served.engine.tokens
    await asyncio.sleep(WINDOW_S)
    return (served.engine.tokens - before) / (time.monotonic() - began)


async def alone(served: Served) -> float:
    """Tokens per second without an endpoint."""

    async def ask(number: int) -> None:
        for call in range(10**6):
            seed = number * 10**6 + call
            await served.stepper.sample(Request(f"{seed}", (1, 2, 3), rft.Sampling(4096, 1.0, seed)))

    asking = [asyncio.ensure_future(ask(number)) for number in range(SESSIONS)]
    try:
        return await tokens_per_second(served)
    finally:
        for task in asking:
            task.cancel()


async def through_endpoint(served: Served) -> float:
    """Tokens per second of as many clients."""
    with other_process([served.policy(rft.Sampling(4096, 1.0)) for _ in range(SESSIONS)]):
        return await tokens_per_second(served)


async def main(model: str) -> None:
    """Measures and writes."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    async def run(measure: Callable[[Served], Awaitable[Any]], **engine: Any) -> Any:
        served = Served(model, tokenizer, **engine)
        try:
            await served.stepper.call(served.engine.start, model, max_model_len=10**6, seed=0)
            return await measure(served)
        finally:
            served.stop()

    times = [await run(processor_time) for _ in range(REPEATS)]
    paced = {"tokens_per_second": TOKENS_PER_SECOND, "mean_tokens": MEAN_TOKENS}
    rates = [(await run(through_endpoint, **paced), await run(alone, **paced)) for _ in range(REPEATS)]
    figures = {
        "milliseconds_per_call": round(1e3 * statistics.median(through - bare for through, bare in times), 2),
        "engine_milliseconds_per_call": round(1e3 * statistics.median(bare for _, bare in times), 2),
        "ratio_64": round(statistics.median(through / bare for through, bare in rates), 3),
        "engine_tokens_per_second_64": round(statistics.median(bare for _, bare in rates)),
        "rounds": [[round(through), round(bare)] for through, bare in rates],
    }
    text = json.dumps(figures, indent=1)
    (RESULTS / "endpoint.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="runs/models/SmolLM2-135M-Instruct")
    parser.add_argument("--client", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asyncio.run(client(*arguments.client) if arguments.client else main(arguments.model))
