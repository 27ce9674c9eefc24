"""Random trees of calls: what they ask, how they are seeded and what they keep does not depend on time."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_rft.experience import Experience
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.workflows.policy import Policy, Reply
from lightning_rft.settings import Sampling

Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path)


class Idle(selectors.DefaultSelector):
    """Of an event loop that has something happen when it has nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        self.happen: Callable[[], None] = lambda: None

    def select(self, timeout: float | None = None) -> Any:
        if timeout != 0:
            self.happen()
        return super().select(0)


class Engine:
    """Samples any tokens of the vocabulary from a request's seed; which request ends next is drawn."""

    def __init__(self, tokenizer: Any, order: int, selector: Idle) -> None:
        self.requests: list[Request] = []
        self._tokenizer = tokenizer
        self._order = random.Random(order)
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []
        selector.happen = self._end_one

    async def __call__(self, request: Request) -> Completion:
        self.requests.append(request)
        self._waiting.append((request, asyncio.get_running_loop().create_future()))
        return await self._waiting[-1][1]

    def _end_one(self) -> None:
        request, future = self._waiting.pop(self._order.randrange(len(self._waiting)))
        rng = random.Random(request.sampling.seed)
        ids = [rng.randrange(len(self._tokenizer)) for _ in range(rng.randint(4, 8))]
        ids += [self._tokenizer.eos_token_id] * (ends := rng.random() < 0.5)
        reason = "stop" if ends else "length"
        future.set_result(Completion(request.id, tuple(ids), (-1.0,) * len(ids), (0,) * len(ids), reason))


class Oracle:
    """Compares every prompt with every earlier conversation, as simply as that can be done."""

    def __init__(self) -> None:
        self.drift = 0
        self.kept: list[tuple[str, Reply]] = []  # what a prompt of so many must begin with
        self._answered: list[tuple[Messages, Reply]] = []

    def ask(self, messages: Messages) -> Reply | None:
        best: tuple[int, bool, Reply] | None = None
        for conversation, reply in self._answered:
            length = len(conversation)
            if length < len(messages) and stripped(conversation) == stripped(messages[:length]):
                found = length, conversation == messages[:length], reply
                best = found if best is None or found[:2] > best[:2] else best
        self.drift += best is not None and not best[1]
        return best and best[2]

    def answer(self, messages: Messages, reply: Reply) -> None:
        self._answered.append(([*messages, dict(reply.message)], reply))


def stripped(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


async def agent(policy: Policy, oracle: Oracle, script: Sequence[Any], messages: Messages, name: str) -> None:
    """Does what a script says: turns, edits of the last answer, compaction, parallel agents that go on from here."""
    for step, action in enumerate(script):
        if isinstance(action, list):
            forks = (agent(policy, oracle, one, [*messages], f"{name}{fork}") for fork, one in enumerate(action))
            await asyncio.gather(*forks)
        elif action == "compact":
            messages = [{"role": "user", "content": f"{name} until {step}"}]
        elif messages and action != "turn":
            content = messages[-1]["content"]
            content = {"respell": f"{content} ", "edit": f"no, {content}"}[action]
            messages = [*messages[:-1], {"role": messages[-1]["role"], "content": content}]
        if action not in ("respell", "edit", "compact") and not isinstance(action, list):
            messages = [*messages, {"role": "user", "content": f"{name}.{step}"}]
            earlier = oracle.ask(messages)
            reply = await policy([dict(message) for message in messages])
            oracle.answer(messages, reply)
            if earlier is not None:
                before = (*earlier.turn.prompt_ids.tolist(), *earlier.token_ids)
                assert tuple(reply.turn.prompt_ids.tolist())[: len(before)] == before
            messages = [*messages, dict(reply.message)]


def run(tokenizer: Any, script: Sequence[Any], order: int) -> tuple[Policy, Engine, Oracle]:
    selector = Idle()
    loop = asyncio.SelectorEventLoop(selector)
    try:
        engine, oracle = Engine(tokenizer, order, selector), Oracle()
        policy = Policy(engine, tokenizer, name="s", sampling=Sampling(9, 1.0), max_model_len=10**6, seed=5)
        loop.run_until_complete(agent(policy, oracle, script, [], ""))
        return policy, engine, oracle
    finally:
        loop.close()


actions = st.sampled_from(["turn", "turn", "turn", "respell", "edit", "compact"])
scripts = st.recursive(
    st.lists(actions, min_size=1, max_size=5),
    lambda inner: st.lists(actions | st.lists(inner, min_size=1, max_size=3), min_size=1, max_size=5),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(script=scripts, order=st.integers(0, 2**32))
def test_trees_of_calls(tokenizer: Any, script: Sequence[Any], order: int) -> None:
    policy, engine, oracle = run(tokenizer, script, 0)
    assert policy.drift == oracle.drift
    turns = policy.turns
    Experience("0", 0, turns, 0.0)  # which checks parents
    assert [turn.prompt_ids.tolist() for turn in turns] == [list(request.prompt_ids) for request in engine.requests]
    assert len({request.id for request in engine.requests}) == len(engine.requests)
    other_policy, other, other_oracle = run(tokenizer, script, order)
    assert Counter(map(asked, other.requests)) == Counter(map(asked, engine.requests))
    assert other_policy.drift == policy.drift == other_oracle.drift
    # the same turns with the same parents, in another order
    assert Counter(lineages(other_policy)) == Counter(lineages(policy))


def asked(request: Request) -> tuple[Any, ...]:
    return request.id, request.prompt_ids, request.sampling.seed


def lineages(policy: Policy) -> list[tuple[Any, ...]]:
    """Each turn's tokens, with those of its ancestors."""
    lines: list[tuple[Any, ...]] = []
    for turn in policy.turns:
        above = () if turn.parent is None else lines[turn.parent]
        lines.append((above, tuple(turn.prompt_ids.tolist()), tuple(turn.token_ids.tolist())))
    return lines


def test_equal_prompts_at_the_same_time_differ_in_their_random_numbers(tokenizer: Any) -> None:
    policy, engine, _ = run(tokenizer, ["turn", [["turn"]] * 3], 1)
    assert len({request.prompt_ids for request in engine.requests[1:]}) == 3  # each agent has its own name

    async def same(policy: Policy) -> None:
        await asyncio.gather(*(policy("same") for _ in range(4)))

    for seed in (5, 2**31 - 1):
        selector = Idle()
        loop = asyncio.SelectorEventLoop(selector)
        engine = Engine(tokenizer, 0, selector)
        policy = Policy(engine, tokenizer, name="s", sampling=Sampling(9, 1.0), max_model_len=99, seed=seed)
        loop.run_until_complete(same(policy))
        loop.close()
        seeds = [request.sampling.seed for request in engine.requests]
        assert seeds[0] == seed and len(set(seeds)) == 4 and all(0 <= seed < 2**31 for seed in seeds)
