"""Answers in OpenAI's dialect. Pure.

A stream sends an answer in few pieces once all of it is sampled: nobody trains from a stream.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from lightning_rft.explorer.worker.openai_requests import Call
from lightning_rft.explorer.workflows.reply import Reply
from lightning_rft.turn import Turn

__all__ = ["MODELS", "chat_answer", "completion_answer", "generate_answer", "stream"]

MODELS = {
    "object": "list",
    "data": [{"id": "policy", "object": "model", "created": 0, "owned_by": "lightning_rft"}],
}


def chat_answer(call: Call, reply: Reply, message: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """To ``/v1/chat/completions``; ``message`` is what the reply says."""
    logprobs = None
    if call.logprobs is not None:
        logprobs = {
            "content": [_spelled(*token) for token in _tokens(reply.turn, call.logprobs, tokenizer)],
            "refusal": None,
        }
    choice = {
        "index": 0,
        "message": {**message, "refusal": None},
        "finish_reason": "tool_calls" if message.get("tool_calls") else reply.finish_reason,
        "logprobs": logprobs,
    }
    return _answer("chatcmpl", "chat.completion", call, reply.turn, choice)


def completion_answer(call: Call, reply: Reply, message: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """To ``/v1/completions``."""
    logprobs = None
    if call.logprobs is not None:
        tokens = list(_tokens(reply.turn, call.logprobs, tokenizer))
        texts = [text for text, _, _ in tokens]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": [dict(others) for _, _, others in tokens] if call.logprobs else None,
            "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
        }
    choice = {"index": 0, "text": str(reply), "finish_reason": reply.finish_reason, "logprobs": logprobs}
    return _answer("cmpl", "text_completion", call, reply.turn, choice)


def generate_answer(call: Call, reply: Reply, message: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """To ``/inference/v1/generate``, as vLLM answers it."""
    ids, logprobs = reply.turn.token_ids.tolist(), None
    if call.logprobs is not None:
        others = _others(reply.turn, call.logprobs)
        logprobs = {
            "content": [
                {
                    "token": f"token_id:{token}",
                    "token_id": token,
                    "logprob": logprob,
                    "top_logprobs": [{"token_id": other, "logprob": of_other} for other, of_other in top],
                }
                for token, logprob, top in zip(ids, reply.turn.logprobs.tolist(), others, strict=True)
            ]
        }
    choice = {"index": 0, "token_ids": ids, "finish_reason": reply.finish_reason, "logprobs": logprobs}
    return {"request_id": uuid.uuid4().hex, "model": call.model, "choices": [choice], "usage": _usage(reply.turn)}


def stream(answer: Mapping[str, Any], usage: bool) -> bytes:
    """Server-sent events that say the same."""
    chunks = [dict(chunk) for chunk in _chunks(answer)]
    if usage:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        chunks.append({**chunks[0], "choices": [], "usage": answer["usage"]})
    events = [*map(msgspec.json.encode, chunks), b"[DONE]"]
    return b"".join(b"data: " + event + b"\n\n" for event in events)


def _chunks(answer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    (choice,) = answer["choices"]
    head = {key: value for key, value in answer.items() if key not in ("choices", "usage")}
    if "message" not in choice:
        yield {**head, "choices": [choice]}
        return
    said = choice["message"]
    calls = [{"index": index, **call} for index, call in enumerate(said.get("tool_calls") or ())]
    delta = said | ({"tool_calls": calls} if calls else {})
    more = {name: value for name, value in choice.items() if name not in ("message", "finish_reason")}
    head["object"] = "chat.completion.chunk"
    yield {**head, "choices": [{**more, "delta": delta, "finish_reason": None}]}
    head.pop("prompt_token_ids", None)
    yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"], "logprobs": None}]}


def _answer(prefix: str, kind: str, call: Call, turn: Turn, choice: dict[str, Any]) -> dict[str, Any]:
    answer = {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": call.model,
        "choices": [choice],
        "usage": _usage(turn),
    }
    if call.token_ids:
        answer["prompt_token_ids"], choice["token_ids"] = turn.prompt_ids.tolist(), turn.token_ids.tolist()
    return answer


def _usage(turn: Turn) -> dict[str, int]:
    read = len(turn.prompt_ids)
    return {"prompt_tokens": read, "completion_tokens": turn.num_tokens, "total_tokens": read + turn.num_tokens}


def _tokens(turn: Turn, others: int, tokenizer: Any) -> Iterator[tuple[str, float, list[tuple[str, float]]]]:
    """Each token as text, its log-prob, and the same of the most likely tokens in its place."""
    top = _others(turn, others)
    for token, logprob, choices in zip(turn.token_ids.tolist(), turn.logprobs.tolist(), top, strict=True):
        yield tokenizer.decode([token]), logprob, [(tokenizer.decode([other]), of_it) for other, of_it in choices]


def _others(turn: Turn, count: int) -> list[list[tuple[int, float]]]:
    """For each token, the most likely ones in its place, where the sampling keeps them."""
    if not count:
        return [[] for _ in range(turn.num_tokens)]
    assert turn.support is not None  # else the request was refused
    choices = iter(zip(turn.support.token_ids.tolist(), turn.support.logprobs.tolist(), strict=True))
    return [
        sorted((next(choices) for _ in range(kept)), key=lambda choice: -choice[1])[:count]
        for kept in turn.support.counts.tolist()
    ]


def _spelled(text: str, logprob: float, others: Sequence[tuple[str, float]]) -> dict[str, Any]:
    top = [{"token": name, "logprob": of_other, "bytes": list(name.encode())} for name, of_other in others]
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": top}
