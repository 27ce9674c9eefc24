"""Ways of sampling, and the log-probs that training computes for what an engine sampled so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_rft.experience import Truncation, Turn
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.sampling import Sampling
from lightning_rft.trainer.passes import logprobs_of
from lightning_rft.trainer.ranks import Ranks
from lightning_rft.trainer.shortcuts import FastPath, probe
from lightning_rft.trainer.weighted import WeightedTurn

PROMPTS = [(7, 8, 9), (11, 50, 60, 12, 90, 33, 21, 17)]
TRUNCATIONS = {
    "top_k=8": Sampling(20, 0.7, top_k=8),
    "top_k=20, top_p=0.8": Sampling(20, 1.3, top_k=20, top_p=0.8),
    "top_k=64, min_p=0.1": Sampling(20, 0.8, top_k=64, min_p=0.1),
}
#: What also keeps tokens from being sampled; top_k is as large as the vocabulary needs to show it.
REMOVALS = {
    "min_new_tokens": Sampling(12, 1.2, top_k=64, min_new_tokens=10, stop_token_ids=range(60, 110)),
    "bans": Sampling(12, 1.2, top_k=64, logit_bias=dict.fromkeys(range(20, 110), -100.0)),
}


def requests(ways: Mapping[str, Sampling], samples: int = 4) -> list[Request]:
    """Some of each way, named ``way/prompt/sample``."""
    return [
        Request(f"{way}/{index}/{sample}", prompt, replace(sampling, seed=10 * index + sample))
        for way, sampling in ways.items()
        for index, prompt in enumerate(PROMPTS)
        for sample in range(samples)
    ]


def drain(engine: Any, asked: Iterable[Request]) -> dict[str, Completion]:
    """What an engine answers."""
    for request in asked:
        engine.add(request)
    done: dict[str, Completion] = {}
    while engine.has_work:
        done |= {completion.request_id: completion for completion in engine.step()}
    return done


def turns(asked: Iterable[Request], done: Mapping[str, Completion]) -> list[WeightedTurn]:
    """The answers as what is trained; the samples of a prompt are a group."""
    found = []
    for group, (_, of_prompt) in enumerate(groupby(asked, key=lambda request: request.id.rsplit("/", 1)[0])):
        for request in of_prompt:
            one, sampling = done[request.id], request.sampling
            temperature = sampling.temperature or 0.0
            turn = Turn(
                request.prompt_ids, one.token_ids, one.logprobs, one.versions, one.finish_reason, temperature,
                sampling.truncation, support=one.support,
            )  # fmt: skip
            found.append(WeightedTurn(turn, group, len(found), turn.num_tokens))
    return found


def paths(model: Any) -> dict[str, FastPath]:
    """Every way in which training computes log-probs."""
    path = probe(model, [], "sdpa")
    assert path.shared and path.chunked_head is not None
    path = replace(path, balance=1e12)  # whatever attention costs, so that rows are shared
    return {
        f"{'shared' if shared else 'ordinary'} rows, {'chunked' if chunked else 'plain'} head": replace(
            path, shared=shared, chunked_head=path.chunked_head if chunked else None
        )
        for shared in (True, False)
        for chunked in (True, False)
    }


def gap(model: Any, path: FastPath, sampled: list[WeightedTurn], max_tokens: int | None = None) -> float:
    """Largest difference between log-probs in training and in sampling."""
    trained = logprobs_of(model, sampled, path, max_tokens=max_tokens, ranks=Ranks())
    pairs = zip(trained, sampled, strict=True)
    return float(max(np.abs(logprobs - turn.turn.logprobs).max() for logprobs, turn in pairs))


def naive(sampled: list[WeightedTurn]) -> list[WeightedTurn]:
    """The same turns, as if every token had been drawn from the whole vocabulary."""

    def bare(turn: Turn) -> Turn:
        *arguments, _ = turn.packed()
        arguments[6] = Truncation()
        return Turn(*arguments)

    return [one._replace(turn=bare(one.turn)) for one in sampled]


def masses(completion: Completion) -> Tensor:
    """Total probability of the tokens to choose from, for each token."""
    assert completion.support is not None
    counts = completion.support.counts.tolist()
    parts = torch.tensor(completion.support.logprobs.tolist()).exp().split(counts)
    return torch.stack([part.sum() for part in parts])
