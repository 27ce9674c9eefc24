"""What a policy makes of prompts and calls."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task, Turn
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.workflows.policy import Encoded, Policy
from lightning_rft.explorer.workflows.single_turn import SingleTurn
from lightning_rft.settings import Sampling
from lightning_rft.tasks.prompts import encode_prompt

CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path)


class Sampler:
    """Answers ``ok``, and an end-of-sequence token; keeps what it was asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.requests: list[Request] = []
        self.answer = (*tokenizer("ok")["input_ids"], tokenizer.eos_token_id)

    async def __call__(self, request: Request) -> Completion:
        self.requests.append(request)
        tokens, versions = len(self.answer), (len(self.requests),) * 3
        return Completion(request.id, self.answer, (-0.1, -0.2, -0.3)[:tokens], versions[:tokens], "stop")


def make_policy(tokenizer: Any, sampler: Sampler, **changes: Any) -> Policy:
    settings: dict[str, Any] = {
        "name": "run/3/1",
        "sampling": Sampling(max_new_tokens=5, temperature=0.7),
        "max_model_len": 50,
        "seed": 11,
    }
    return Policy(sampler, tokenizer, **settings | changes)


def test_single_turn(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer)
    policy = make_policy(tokenizer, sampler)
    assert asyncio.run(SingleTurn()(Task(CHAT), policy)) == "ok"  # without the special token
    (request,) = sampler.requests
    assert request == Request("run/3/1/0", encode_prompt(tokenizer, CHAT), Sampling(5, 0.7, 11))
    (turn,) = policy.turns
    assert turn == Turn(request.prompt_ids, sampler.answer, (-0.1, -0.2, -0.3), (1, 1, 1), "stop", temperature=0.7)
    assert policy.seconds > 0


def test_every_call_is_a_turn_with_random_numbers_of_its_own(tokenizer: Any) -> None:
    async def workflow(policy: Policy) -> str:
        draft = await policy("Q:")
        return await policy(f"Q: {draft} Better:")

    sampler = Sampler(tokenizer)
    policy = make_policy(tokenizer, sampler)
    asyncio.run(workflow(policy))
    first, second = sampler.requests
    assert first.id == "run/3/1/0" != second.id and second.id.startswith("run/3/1/")
    assert first.sampling.seed == 11 != second.sampling.seed
    assert tokenizer.decode(second.prompt_ids) == "Q: ok Better:"
    assert [turn.versions[0] for turn in policy.turns] == [1, 2]


def test_seeds_stay_in_range_and_apart(tokenizer: Any) -> None:
    async def four(policy: Policy) -> None:
        for _ in range(4):
            await policy("x")

    sampler = Sampler(tokenizer)
    asyncio.run(four(make_policy(tokenizer, sampler, seed=2**31 - 1)))
    seeds = [request.sampling.seed for request in sampler.requests]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_what_does_not_fit_the_context(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer)
    policy = make_policy(tokenizer, sampler)
    asyncio.run(policy("x" * 45))  # fills it exactly
    with pytest.raises(ConfigurationError, match=r"prompt of 46 tokens and max_new_tokens=5 do not fit .* 50 tokens"):
        asyncio.run(policy("x" * 46))
    assert len(sampler.requests) == len(policy.turns) == 1


def test_samples_of_a_group_encode_a_prompt_once_and_a_changed_one_anew(tokenizer: Any) -> None:
    class Counts:
        calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return tokenizer.apply_chat_template(*args, **kwargs)

    counts, sampler = Counts(), Sampler(tokenizer)
    encoded: Encoded = {}
    messages = [{"role": "user", "content": "1+1"}]

    async def twice(task: Task, policy: Policy) -> str:
        await policy(messages)
        messages.append({"role": "user", "content": "2+2"})  # the very same list
        return await policy(messages)

    for _ in range(3):
        del messages[1:]
        asyncio.run(twice(Task(messages), make_policy(counts, sampler, encoded=encoded)))
    assert counts.calls == 2
    first, second = encode_prompt(tokenizer, messages[:1]), encode_prompt(tokenizer, messages)
    assert [request.prompt_ids for request in sampler.requests] == [first, second] * 3 and first != second


def asked(tokenizer: Any, prompt: Any, policy: dict[str, Any] | None = None, **sampling: Any) -> Request:
    sampler = Sampler(tokenizer)
    asyncio.run(make_policy(tokenizer, sampler, **policy or {})(prompt, **sampling))
    return sampler.requests[0]


def test_a_call_sets_what_it_names_and_inherits_the_rest(tokenizer: Any) -> None:
    inherited = {"sampling": Sampling(5, 0.7, 1, top_k=8, stop="Q:", min_new_tokens=2)}
    request = asked(tokenizer, "x", inherited, max_new_tokens=9, stop=["\n"], min_new_tokens=0)
    assert request.sampling == Sampling(9, 0.7, 11, top_k=8, stop=("\n",), min_new_tokens=0)


def test_a_call_refuses_what_is_no_setting(tokenizer: Any) -> None:
    for name in ("max_tokens", "seed"):
        with pytest.raises(ConfigurationError, match=f"{name}=.* it takes chat_template_kwargs, logit_bias, max_new_"):
            asked(tokenizer, "x", **{name: 3})
    with pytest.raises(ConfigurationError, match="top_p=2 must be above 0"):
        asked(tokenizer, "x", top_p=2)


def test_a_call_for_training_refuses_what_training_does_not_take(tokenizer: Any) -> None:
    for setting in ({"temperature": 0.0}, {"top_p": 0.9}, {"structured": {"choice": ["a"]}}):
        with pytest.raises(ConfigurationError, match="in training"):
            asked(tokenizer, "x", **setting)
        assert asked(tokenizer, "x", {"trained": False}, **setting).sampling.seed == 11


def test_the_text_ends_before_a_text_that_ends_it(tokenizer: Any) -> None:
    for stop, text in (("ok", ""), ("k", "o"), ("x", "ok"), ("o", "ok")):
        sampler = Sampler(tokenizer)
        sampler.answer = (*tokenizer("ok")["input_ids"],)
        policy = make_policy(tokenizer, sampler)
        assert asyncio.run(policy("x", stop=stop)) == text


def test_variables_reach_the_chat_template(tokenizer: Any, tiny_model_path: Path) -> None:
    thinks: Any = AutoTokenizer.from_pretrained(tiny_model_path)
    thinks.chat_template += "{% if not enable_thinking %}</think>{% endif %}"
    plain = asked(thinks, CHAT, chat_template_kwargs={"enable_thinking": True}).prompt_ids
    short = asked(thinks, CHAT, chat_template_kwargs={"enable_thinking": False}).prompt_ids
    assert thinks.decode(short) == thinks.decode(plain) + "</think>"
    encoded: Encoded = {}
    for thinking in (True, False):
        asked(thinks, CHAT, {"encoded": encoded}, chat_template_kwargs={"enable_thinking": thinking})
    assert {ids for ids, _ in encoded.values()} == {plain, short}
