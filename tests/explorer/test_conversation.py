"""Conversations of several calls: what was sampled is never encoded again."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_rft.errors import ConfigurationError, ContextFull
from lightning_rft.experience import Experience
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.workflows.policy import Policy, Reply
from lightning_rft.settings import Sampling
from lightning_rft.tasks.prompts import encode_prompt

SYSTEM = {"role": "system", "content": "Add."}
QUESTION = {"role": "user", "content": "1+1"}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path)


class Sampler:
    """Answers with given ids, one after another; the default is ``ok`` and the end of a turn."""

    def __init__(self, tokenizer: Any, *answers: Sequence[int] | str, finish_reason: str = "stop") -> None:
        self.tokenizer = tokenizer
        self.requests: list[Request] = []
        self.finish_reason = finish_reason
        self.answers = [self.ids(answer) for answer in answers]

    def ids(self, answer: Sequence[int] | str) -> tuple[int, ...]:
        if isinstance(answer, str):
            answer = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return tuple(answer)

    async def __call__(self, request: Request) -> Completion:
        self.requests.append(request)
        answer = self.answers.pop(0) if self.answers else self.ids("ok<|end|>")
        return Completion(request.id, answer, (-0.5,) * len(answer), (0,) * len(answer), self.finish_reason)


def make_policy(sampler: Any, tokenizer: Any, **changes: Any) -> Policy:
    settings: dict[str, Any] = {"name": "s", "sampling": Sampling(8, 1.0), "max_model_len": 5_000, "seed": 3}
    return Policy(sampler, tokenizer, **settings | changes)


def parents(policy: Policy) -> list[int | None]:
    Experience("0", 0, policy.turns, 0.0)  # which checks them
    return [turn.parent for turn in policy.turns]


def kept(request: Request, turn: Any) -> tuple[int, ...]:
    """What a request has behind an earlier turn's prompt and answer."""
    before = (*turn.prompt_ids.tolist(), *turn.token_ids.tolist())
    assert request.prompt_ids[: len(before)] == before
    return request.prompt_ids[len(before) :]


def test_messages_that_go_on_keep_what_was_sampled(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer)
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        messages = [SYSTEM, QUESTION]
        for number in range(3):
            answer = await policy(messages)
            assert answer == "ok" and answer.message == {"role": "assistant", "content": "ok"}
            messages += [answer.message, user(str(number))]
        assert policy.messages == messages[:-1]

    asyncio.run(turns())
    assert parents(policy) == [None, 0, 1] and policy.drift == 0
    for number, request in enumerate(sampler.requests[1:]):
        # the end of the turn was sampled, and is not repeated
        assert tokenizer.decode(kept(request, policy.turns[number])) == f"<|user|>{number}<|end|><|assistant|>"
    assert sampler.requests[2].prompt_ids == encode_prompt(tokenizer, policy.messages[:-1])  # here the text round-trips


def test_an_answer_that_was_cut_is_ended(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer, "ok", finish_reason="length")
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        answer = await policy([QUESTION])
        assert answer.finish_reason == "length"
        await policy([QUESTION, answer.message, QUESTION])

    asyncio.run(turns())
    rest = kept(sampler.requests[1], policy.turns[0])
    assert tokenizer.decode(rest) == "<|end|><|user|>1+1<|end|><|assistant|>"


def pairs(tokenizer: Any) -> Any:
    """A tokenizer that has merged letters: a text has one encoding, and many ways to be sampled."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([(Path(__file__).parent / "test_workflow.py").read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=tokenizer.chat_template)


def test_ids_that_do_not_survive_decoding_are_kept_for_ten_turns(tokenizer: Any) -> None:
    tokenizer = pairs(tokenizer)
    engine = FakeEngine(vocab_size=len(tokenizer), mean_tokens=20)
    engine.start("", max_model_len=5_000, seed=0)
    requests: list[Request] = []

    async def sample(request: Request) -> Completion:
        requests.append(request)
        engine.add(request)
        while not (done := engine.step()):
            pass
        return done[0]

    policy = make_policy(sample, tokenizer, sampling=Sampling(30, 1.0, min_new_tokens=10), trained=False)

    async def turns() -> None:
        messages = [QUESTION]
        for _ in range(10):
            answer = await policy(json.loads(json.dumps(messages)))  # as a client sends it: text alone
            again = tokenizer(answer.raw_text, add_special_tokens=False)["input_ids"]
            assert tuple(again) != answer.token_ids
            messages += [{"role": "assistant", "content": str(answer)}, QUESTION]

    asyncio.run(turns())
    assert parents(policy) == [None, *range(9)] and policy.drift == 0
    for request, turn in zip(requests[1:], policy.turns, strict=False):
        assert tokenizer.decode(kept(request, turn)) == "<|end|><|user|>1+1<|end|><|assistant|>"


def test_text_goes_on_too(tokenizer: Any) -> None:
    odd = (*tokenizer("ok")["input_ids"], tokenizer.unk_token_id, 99)
    sampler = Sampler(tokenizer, odd, finish_reason="length")
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        answer = await policy("Q:")
        assert answer.raw_text == tokenizer.decode(odd)
        await policy(f"Q:{answer} Q2:")
        await policy(f"Q:{answer.raw_text} Q3:")
        await policy(f"Q: {answer}")

    asyncio.run(turns())
    assert parents(policy) == [None, 0, 0, None] and policy.drift == 0
    assert [tokenizer.decode(kept(sampler.requests[i], policy.turns[0])) for i in (1, 2)] == [" Q2:", " Q3:"]


def test_text_that_leaves_out_the_end_of_an_answer(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer)
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        answer = await policy("Q:")
        await policy(f"Q:{answer} Q2:")
        await policy(f"Q:{answer.raw_text} Q3:")

    asyncio.run(turns())
    assert [tokenizer.decode(request.prompt_ids) for request in sampler.requests] == [
        "Q:",
        "Q:ok Q2:",
        "Q:ok<|end|> Q3:",
    ]
    assert parents(policy) == [None, None, 0] and policy.drift == 1


def test_token_ids_are_used_as_they_are(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer)
    policy = make_policy(sampler, tokenizer)

    async def turns() -> Reply:
        answer = await policy([5, 6, 7])
        assert answer.context_left == 5_000 - 3 - 3
        assert policy.messages is None
        return await policy([*answer.turn.prompt_ids, *answer.token_ids, 9])

    asyncio.run(turns())
    assert sampler.requests[0].prompt_ids == (5, 6, 7)
    assert parents(policy) == [None, 0]
    for wrong in ([-1], [len(tokenizer)], [1, 2.5], [1, "a"], [2**40]):
        with pytest.raises(ConfigurationError, match="prompt"):
            asyncio.run(policy(wrong))
    with pytest.raises(ConfigurationError, match="tools are for chat messages"):
        asyncio.run(policy([1], tools=[{}]))


def test_a_conversation_that_was_edited_begins_anew(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer, "o<|unk|>k<|end|>")  # as text, ok
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        answer = await policy([QUESTION])
        await policy([QUESTION, {"role": "assistant", "content": "no"}, QUESTION])
        await policy([user("2+2"), answer.message, QUESTION])
        await policy([QUESTION, answer.message, QUESTION], chat_template_kwargs={"thinks": False})

    asyncio.run(turns())
    assert policy.drift == 0
    assert parents(policy) == [None] * 4


@pytest.mark.parametrize(
    ("given", "sent", "drift"),
    [
        ({"content": " ok\n"}, {"content": "ok"}, 1),
        ({"content": "ok"}, {"content": "ok", "tool_calls": None, "refusal": None, "annotations": []}, 0),
        ({"content": "ok", "reasoning": "Hm"}, {"content": "ok"}, 0),
        ({"content": "ok"}, {"content": [{"type": "text", "text": "o"}, {"type": "text", "text": "k"}]}, 0),
    ],
)
def test_messages_may_come_back_spelled_in_another_way(
    tokenizer: Any, given: dict[str, Any], sent: dict[str, Any], drift: int
) -> None:
    sampler = Sampler(tokenizer)
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        answer = await policy([QUESTION])
        answer.message = {"role": "assistant", **given}
        await policy([QUESTION, {"role": "assistant", **sent}, QUESTION])

    asyncio.run(turns())
    assert parents(policy) == [None, 0] and policy.drift == drift


def test_of_two_answers_the_one_that_is_spelled_alike_goes_on(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer, " ok<|end|>", "ok<|end|>", "ok <|end|>")
    policy = make_policy(sampler, tokenizer)

    async def turns() -> None:
        for _ in range(3):
            await policy([QUESTION])
        for content in ("ok", "ok\n"):
            await policy([QUESTION, {"role": "assistant", "content": content}, QUESTION])

    asyncio.run(turns())
    assert parents(policy) == [None, None, None, 1, 0] and policy.drift == 1


def test_what_does_not_fit_says_so_and_may_be_caught(tokenizer: Any) -> None:
    sampler = Sampler(tokenizer)
    policy = make_policy(sampler, tokenizer, max_model_len=20)

    async def turns() -> Reply:
        with pytest.raises(ContextFull, match=r"prompt of 13 tokens and max_new_tokens=8 do not fit .* 20 tokens"):
            await policy("x" * 13)
        return await policy("x" * 12)

    assert asyncio.run(turns()).context_left == 20 - 12 - 3
    assert sampler.requests[0].sampling.seed == 3  # the first one that was sampled


def test_a_reply_is_text_wherever_it_goes(tokenizer: Any) -> None:
    policy = make_policy(Sampler(tokenizer, "o<|unk|>k"), tokenizer)

    async def turns() -> None:
        reply = await policy([QUESTION], stop="k")
        assert (reply, reply.whole_text, reply.raw_text) == ("o", "ok", "o<|unk|>k")
        for other in (copy.deepcopy(reply), pickle.loads(pickle.dumps(reply)), json.loads(json.dumps(reply))):
            assert other == "o" and type(other) is str
        answer = {"role": "assistant", "content": reply}
        await policy([QUESTION, answer, user(reply)])
        assert policy.messages is not None
        assert {type(message["content"]) for message in policy.messages} == {str}
        await policy(reply)

    asyncio.run(turns())
    assert parents(policy) == [None, 0, None] and policy.messages is None


def test_rewards_of_turns(tokenizer: Any) -> None:
    policy = make_policy(Sampler(tokenizer), tokenizer)

    async def turns() -> None:
        (await policy("a")).reward = 0.5
        await policy("b")

    asyncio.run(turns())
    assert [turn.reward for turn in policy.turns] == [0.5, None]


def test_an_endpoint_is_for_explorers(tokenizer: Any) -> None:
    policy = make_policy(Sampler(tokenizer), tokenizer)
    with pytest.raises(ConfigurationError, match="needs a server"):
        policy.endpoint()
    served: list[Any] = []

    def serve(policy: Policy, **parsers: Any) -> str:
        policy.at_close(lambda: served.append("ended"))
        served.append(parsers)
        return "endpoint"

    policy = make_policy(Sampler(tokenizer), tokenizer, serve=serve)
    assert policy.endpoint(tool_parser="hermes") == "endpoint"
    policy.close()
    policy.close()
    assert served == [{"tool_parser": "hermes", "reasoning_parser": None}, "ended"]
    with pytest.raises(ConfigurationError, match="after the end"):
        policy.endpoint()
