"""Tokens drawn from a part of the vocabulary: softmax, gradient and normalisation are over that part."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import lightning_rft as rft
from lightning_rft.experience import Experience, Group, GroupKey, Support, Truncation, Turn
from lightning_rft.trainer import linear_logprobs as module
from lightning_rft.trainer.linear_logprobs import LogitTransform, linear_logprobs
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.objectives.tokens import TokenBatch
from lightning_rft.trainer.packing import pack
from lightning_rft.trainer.weighted import sampled_turns, token_batch, weighted_turns
from tests.training_step import SteppedModule

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = range(5, 100)


def make_turn(draw: random.Random, prompt: Sequence[int], *, truncated: bool = True) -> Turn:
    """One with tokens that were chosen from one to nine ids, or from all."""
    tokens = [draw.choice(VOCABULARY) for _ in range(draw.randint(1, 9))]
    logprobs, chosen_from = [-draw.uniform(4.2, 5.2) for _ in tokens], []
    if truncated:
        for token in tokens:
            others = [other for other in draw.sample(VOCABULARY, draw.choice([0, 0, 1, 3, 8])) if other != token]
            chosen_from.append(draw.sample([token, *others], len(others) + 1))
        # about those of the model
        logprobs = [-math.log(len(ids)) + (draw.uniform(-0.3, 0.3) if len(ids) > 1 else 0.0) for ids in chosen_from]
    flat = [token for ids in chosen_from for token in ids]
    support = Support(map(len, chosen_from), flat, [0.0] * len(flat)) if truncated else None
    sampling = Truncation(9) if truncated else Truncation()
    temperature = draw.choice([0.7, 1.0, 1.6])
    return Turn(prompt, tokens, logprobs, [0] * len(tokens), "stop", temperature, sampling, support=support)


def make_batch(seed: int, samples: int = 3) -> list[Group]:
    draw = random.Random(seed)
    groups = []
    for slot in range(2):
        prompt = [draw.choice(VOCABULARY) for _ in range(draw.randint(1, 9))]
        experiences = []
        for sample in range(samples):
            turns = [make_turn(draw, prompt, truncated=draw.random() < 0.7)]
            if draw.random() < 0.4:
                turns.append(make_turn(draw, [*prompt, 7]))
            experiences.append(Experience(str(slot), sample, tuple(turns), float(sample % 2)))
        groups.append(Group(GroupKey(0, slot), str(slot), tuple(experiences)))
    return groups


def turns_of(groups: Sequence[Group]) -> list[list[Turn]]:
    return [[turn for experience in group.experiences for turn in experience.turns] for group in groups]


def plain(model: Any, groups: Sequence[Sequence[Turn]]) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of each turn alone, with a softmax over the ids that each token was chosen from."""
    logprobs, entropy = [], []
    for turn in (turn for group in groups for turn in group):
        logits = model(input_ids=torch.tensor([[*turn.prompt_ids, *turn.token_ids]])).logits[0]
        logits = logits[len(turn.prompt_ids) - 1 : -1].float() / turn.temperature
        ids = [*range(logits.shape[-1])]
        at = 0
        for index, token in enumerate(turn.token_ids.tolist()):
            if turn.support is not None:
                count = int(turn.support.counts[index])
                ids = turn.support.token_ids[at : at + count].tolist()
                at += count
            scores = logits[index, ids].log_softmax(-1)
            logprobs.append(scores[ids.index(token)])
            entropy.append(-(scores.exp() * scores).sum())
    return torch.stack(logprobs), torch.stack(entropy)


@pytest.fixture(scope="module")
def stepped(tiny_model_path: Path) -> SteppedModule:
    module = SteppedModule(tiny_model_path)
    module.step(make_batch(0))  # tries the model
    assert module.fast_path is not None and module.fast_path.shared and module.fast_path.chunked_head is not None
    return module


def gradients(model: Any, *results: Tensor) -> Tensor:
    model.zero_grad()
    weights = torch.linspace(-1, 1.5, len(results[0]))  # each token its own, so that order matters
    sum((weights * values).sum() for values in results).backward()  # type: ignore[union-attr]
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "ordinary"])
@pytest.mark.parametrize("chunked_head", [LogitTransform(), None], ids=["chunked", "plain"])
def test_values_and_gradients_are_those_of_a_softmax_over_the_support(
    stepped: SteppedModule,
    chunked_head: LogitTransform | None,
    shared: bool,
    entropy_gradient: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_CPU_CHUNK", 7)
    model: Any = stepped.policy
    groups = turns_of(make_batch(1))
    packed = pack(groups, shared=shared)
    found = token_logprobs(model, packed, chunked_head=chunked_head, entropy_gradient=entropy_gradient)
    truth = plain(model, groups)
    torch.testing.assert_close(found, truth, atol=2e-5, rtol=0, check_stride=False)
    count = 2 if entropy_gradient else 1
    ours, theirs = gradients(model, *found[:count]), gradients(model, *truth[:count])
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    naive, _ = token_logprobs(model, replace(packed, support=None), chunked_head=chunked_head)
    assert (naive - truth[0]).abs().max() > 0.1


@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 12),
    width=st.integers(1, 6),
    warm=st.booleans(),
    share=st.sampled_from([0.0, 0.5]),
    transform=st.builds(LogitTransform, st.sampled_from([1.0, 3.0]), st.sampled_from([None, 2.0])),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_linear_head_in_float64(
    seed: int, tokens: int, width: int, warm: bool, share: float, transform: LogitTransform
) -> None:
    """Against autograd, for heads that scale and cap, with rows of the whole vocabulary among the others."""
    numbers = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(*shape, generator=numbers).requires_grad_() for shape in ((tokens, 6), (23, 6), (23,))]
    support = torch.randint(23, (tokens, width), generator=numbers, dtype=torch.int32)
    target = support[:, 0].long()
    whole = torch.rand(tokens, generator=numbers) < 0.3
    support[whole] = -1
    upstream = torch.randn(2, tokens, generator=numbers)
    temperature = torch.linspace(0.5, 1.7, tokens) if warm else None

    doubled = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = transform.scale * torch.nn.functional.linear(*doubled)
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    if temperature is not None:
        logits = logits / temperature[:, None].double()
    kept = torch.zeros(tokens, 23).scatter_(1, support.long().clamp(min=0), 1.0).bool() | whole[:, None]
    distributions = torch.distributions.Categorical(logits=logits.masked_fill(~kept, -1e300))
    truth = distributions.log_prob(target), distributions.entropy()

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return (upstream[0] * logprobs).sum() + share * (upstream[1] * entropy).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_CHUNK", 5)
        ours = linear_logprobs(
            *inputs,
            target,
            temperature=temperature,
            support=support,
            transform=transform,
            entropy_gradient=share > 0,
        )
        found = torch.autograd.grad(loss(*ours), inputs)
    torch.testing.assert_close(ours, tuple(value.float() for value in truth), atol=2e-5, rtol=0)
    for gradient, other in zip(found, torch.autograd.grad(loss(*truth), doubled), strict=True):
        torch.testing.assert_close(gradient, other.float(), atol=1e-4, rtol=1e-4)


def test_a_token_without_an_alternative_has_neither_gradient_nor_entropy(stepped: SteppedModule) -> None:
    model: Any = stepped.policy
    forced = Turn((7, 8), (9, 10), (0.0, 0.0), (0, 0), "stop", support=Support((1, 1), (9, 10), (0.0, 0.0)))
    for chunked_head in (LogitTransform(), None):
        logprobs, entropy = token_logprobs(model, pack([[forced]], shared=False), chunked_head=chunked_head)
        assert logprobs.tolist() == entropy.tolist() == [0.0, 0.0]
        assert not gradients(model, logprobs).any()


OBJECTIVES = [
    rft.GRPO(),
    rft.DrGRPO(),
    rft.GSPO(surrogate=rft.Clip(low=0.5, high=0.5)),
    rft.DAPO(correction=rft.Truncated(level="product")),
    rft.CISPO(normalisation="group"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_the_loss_is_that_of_the_tokens_that_had_an_alternative(objective: Any, stepped: SteppedModule) -> None:
    groups = make_batch(2)
    samples = [experience for group in groups for experience in group.experiences]
    forced = [[turn.support.counts == 1 for turn in one.turns if turn.support is not None] for one in samples]
    assert any(mask.any() for masks in forced for mask in masks)
    stepped.objective = objective
    gradient = stepped.step(groups)
    loss = stepped.logged["rft/loss"]

    model: Any = stepped.policy
    logprobs, _ = plain(model, turns_of(groups))
    sampled = sampled_turns(groups)
    of_turn = torch.tensor([turn.turn.num_tokens for turn in sampled])
    is_free = torch.cat(
        [
            torch.ones(turn.turn.num_tokens, dtype=torch.bool)
            if turn.turn.support is None
            else torch.from_numpy(turn.turn.support.counts > 1)
            for turn in sampled
        ]
    )
    sample = torch.tensor([turn.sample for turn in sampled]).repeat_interleave(of_turn)[is_free]
    lengths = torch.bincount(sample, minlength=len(samples))
    rewards = torch.tensor([one.reward for one in samples], dtype=torch.float64)
    group_of = torch.arange(len(samples)) // 3
    advantages = objective.advantage(rewards, group_of).float()
    tokens = TokenBatch(
        logprobs=logprobs[is_free],
        sampling_logprobs=torch.cat([torch.tensor(turn.turn.logprobs.tolist()) for turn in sampled])[is_free],
        advantages=advantages[sample],
        sample=sample,
        lengths=lengths,
    )
    losses, _ = replace(
        objective, correction=None if objective.correction == "auto" else objective.correction
    ).token_loss(tokens)
    share = {
        "token": torch.full_like(rewards, 1 / int(lengths.sum())),
        "sequence": 1 / lengths / len(samples),
        "group": 1 / torch.zeros(2).index_add(0, group_of, lengths.float())[group_of] / 2,
        "constant": torch.full_like(rewards, 1 / 64 / len(samples)),
    }[objective.normalisation]
    expected = (losses * share.float()[sample]).sum()
    model.zero_grad()
    expected.backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert (gradient - theirs).norm() < 1e-4 * theirs.norm()


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    objective=st.sampled_from(OBJECTIVES),
    shared=st.booleans(),
    chunked=st.booleans(),
    max_tokens=st.sampled_from([1, 30]),
    parts=st.sampled_from([1, 2]),
)
def test_no_cut_changes_the_gradient(
    stepped: SteppedModule, seed: int, objective: Any, shared: bool, chunked: bool, max_tokens: int, parts: int
) -> None:
    groups, path = make_batch(seed), stepped.fast_path
    assert path is not None
    stepped.objective = objective
    gradient = stepped.step(groups)
    stepped.fast_path = replace(path, shared=shared, chunked_head=path.chunked_head if chunked else None)
    cut = stepped.step(groups, max_tokens=max_tokens, parts=parts)
    stepped.fast_path = path
    assert (cut - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9


def test_a_sample_in_which_everything_was_forced_is_left_out() -> None:
    forced = Turn((7,), (9,), (0.0,), (0,), "stop", support=Support((1,), (9,), (0.0,)))
    free = Turn((7,), (9, 8), (-1.0, 0.0), (0, 0), "stop", support=Support((2, 1), (9, 5, 8), (-1.0, -1.0, 0.0)))
    group = Group(GroupKey(0, 0), "0", (Experience("0", 0, (forced,), 1.0), Experience("0", 1, (free,), 0.0)))
    (turn,) = weighted_turns([group], rft.DAPO(), max_new_tokens=4)
    assert turn.sample == 1 and turn.weight == 1.0 and turn.sample_tokens == 1
    _, weights = token_batch([turn], torch.zeros(2), torch.zeros(2))
    assert weights.tolist() == [1.0, 0.0]


def test_truncated_experience_without_its_support_is_refused() -> None:
    turn = Turn((7,), (9,), (-0.5,), (0,), "stop", sampling=Truncation(0, 0.9))
    with pytest.raises(rft.ConfigurationError, match=r"top_p=0.9.*without the tokens to choose from.*top_k from 1 to"):
        pack([[turn]], shared=False)


def test_a_support_that_lacks_its_token_has_it_all_the_same() -> None:
    turn = Turn((7,), (9, 8), (-0.5, -0.5), (0, 0), "stop", support=Support((1, 2), (5, 5, 6), (0.0,) * 3))
    whole = Turn((7,), (3,), (-0.5,), (0,), "stop")
    support = pack([[turn, whole]], shared=False).support
    assert support is not None and support.tolist() == [[5, 9, 9], [5, 6, 8], [-1, 3, 3]]
    assert pack([[whole]], shared=False).support is None
