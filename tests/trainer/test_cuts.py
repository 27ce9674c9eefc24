"""Loss and gradient do not depend on how a batch is cut into micro-batches, parts and rows, nor on its order."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_rft as rft
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.trainer.micro_batches import by_group, micro_batches, split_samples
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.passes import with_drift
from lightning_rft.trainer.weighted import sampled_turns, token_batch, weighted_turns
from tests.training_step import SteppedModule

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVES: list[Objective] = [
    rft.GRPO(),
    rft.DrGRPO(credit="turn"),
    rft.DAPO(),
    rft.GSPO(surrogate=rft.Clip(low=0.5, high=0.5)),
    rft.RLOO(correction=None),
    rft.REINFORCEPlusPlus(correction=rft.Truncated(level="product")),
    rft.SAPO(correction=rft.Masked(0.3, 3.0, level="sequence")),
    rft.CISPO(normalisation="group"),
    rft.OPMD(),
    rft.TOPR(),
]


def make_turn(draw: random.Random, longest: int, finish_reason: str = "stop", reward: float | None = None) -> Turn:
    prompt = tuple(draw.randrange(5, 100) for _ in range(draw.randint(1, 9)))
    length = draw.randint(0, longest)
    tokens = tuple(draw.randrange(5, 100) for _ in range(length))
    logprobs = tuple(-draw.uniform(4.2, 5.2) for _ in range(length))  # about those of the model, log(1/100)
    return Turn(prompt, tokens, logprobs, (0,) * length, finish_reason, reward=reward)


def make_batch(seed: int) -> list[Group]:
    """Groups of all sizes, some samples of several turns, some empty, some cut off."""
    draw = random.Random(seed)
    groups = []
    for slot in range(draw.randint(1, 4)):
        samples = []
        for sample in range(draw.randint(1, 4)):
            reason = draw.choice(["stop", "stop", "length"])
            count = draw.choice([1, 1, 3])
            turns = tuple(make_turn(draw, 9, reason, draw.choice([None, 1.0])) for _ in range(count))
            samples.append(Experience(str(slot), sample, turns, float(draw.randint(0, 2))))
        shared = samples[0].turns[0].prompt_ids
        samples = [
            replace(sample, turns=(first_with(sample.turns[0], shared), *sample.turns[1:])) for sample in samples
        ]
        groups.append(Group(GroupKey(0, slot), str(slot), tuple(samples)))
    return groups


def first_with(turn: Turn, prompt: Any) -> Turn:
    return Turn(tuple(prompt), turn.token_ids, turn.logprobs, turn.versions, turn.finish_reason, reward=turn.reward)


@pytest.fixture(scope="module")
def modules(tiny_model_path: Path) -> dict[str, SteppedModule]:
    """One whose samples share rows, and one whose samples do not."""
    made = {}
    for kind in ("shared", "ordinary"):
        module = SteppedModule(tiny_model_path)
        module.step(make_batch(0))  # tries the model
        assert module._fast_path is not None and module._fast_path.shared
        module._fast_path = replace(module._fast_path, shared=kind == "shared")
        made[kind] = module
    return made


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["shared", "ordinary"]),
    max_tokens=st.sampled_from([None, 1, 20, 60]),
    parts=st.sampled_from([1, 2, 4]),
    order=st.randoms(),
)
def test_no_cut_changes_the_gradient(
    objective: Objective,
    modules: dict[str, SteppedModule],
    seed: int,
    kind: str,
    max_tokens: int | None,
    parts: int,
    order: random.Random,
) -> None:
    groups = make_batch(seed)
    whole, other = modules["shared"], modules[kind]
    whole.objective = other.objective = objective
    gradient = whole.step(groups)
    loss = whole.logged["rft/loss"]
    shuffled = [
        replace(group, experiences=tuple(order.sample(group.experiences, len(group.experiences))))
        for group in order.sample(groups, len(groups))
    ]
    cut = other.step(shuffled, max_tokens=max_tokens, parts=parts)
    assert (cut - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9
    assert other.logged["rft/loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)


def test_a_batch_is_cut_as_finely_as_its_tokens_ask_for(modules: dict[str, SteppedModule]) -> None:
    module = modules["ordinary"]
    module.objective = rft.GRPO()
    groups = make_batch(3)
    module.step(groups)
    assert module.trainer.micro_batches == 1
    module.step(groups, max_tokens=1)
    turns = weighted_turns(groups, module.objective, max_new_tokens=16)
    assert module.trainer.micro_batches >= len(turns) > 1


# The pure parts

COLUMNS: Callable[[list[list[Turn]]], int] = lambda groups: sum(  # noqa: E731
    len(turn.prompt_ids) + turn.num_tokens for group in groups for turn in group
)


@given(seed=st.integers(0, 10**6), shares=st.integers(1, 5), max_tokens=st.sampled_from([None, 1, 12, 40]))
def test_every_turn_is_in_one_micro_batch_and_shares_are_alike(seed: int, shares: int, max_tokens: int | None) -> None:
    turns = sampled_turns(make_batch(seed))
    for shared in (False, True):
        cuts = micro_batches(turns, shares, max_tokens=max_tokens, columns=COLUMNS, shared=shared)
        assert len(cuts) == shares
        assert len({len(cut) for cut in cuts}) == 1
        assert len(cuts[0]) <= max(1, -(-len(turns) // shares)), "none is empty but to make shares alike"
        dealt = [id(turn.turn) for cut in cuts for piece in cut for turn in piece]
        assert sorted(dealt) == sorted(id(turn.turn) for turn in turns)
        if max_tokens is not None:
            pieces = [piece for cut in cuts for piece in cut]
            assert all(len(piece) < 2 or COLUMNS(by_group(piece)) <= max_tokens for piece in pieces)


@given(seed=st.integers(0, 10**6), shares=st.integers(2, 5))
def test_shares_have_about_as_many_tokens(seed: int, shares: int) -> None:
    turns = sampled_turns(make_batch(seed))
    cuts = micro_batches(turns, shares, max_tokens=None, columns=COLUMNS, shared=True)
    tokens = [sum(turn.turn.num_tokens for piece in cut for turn in piece) for cut in cuts]
    longest = max((turn.turn.num_tokens for turn in turns), default=0)
    assert max(tokens) - min(tokens) <= 2 * longest


@given(seed=st.integers(0, 10**6))
def test_what_lies_elsewhere_is_known_of_samples_that_are_split(seed: int) -> None:
    draw = random.Random(seed)
    turns = sampled_turns(make_batch(seed))
    cuts = micro_batches(turns, 1, max_tokens=1, columns=COLUMNS, shared=True)
    split = split_samples(cuts)
    several = [turn.sample for turn in turns]
    assert split == {sample for sample in several if several.count(sample) > 1}
    drifts = {id(turn.turn): draw.uniform(-1, 1) for turn in turns}
    drifted = with_drift(
        turns,
        split,
        lambda chosen: [turn.turn.logprobs + drifts[id(turn.turn)] / turn.turn.num_tokens for turn in chosen],
    )
    for turn in drifted:
        tokens, _ = token_batch([turn], torch.zeros(turn.turn.num_tokens), torch.zeros(turn.turn.num_tokens))
        assert tokens.elsewhere is not None
        others = [o for o in turns if o.sample == turn.sample and o.turn is not turn.turn]
        assert float(tokens.elsewhere) == pytest.approx(sum(drifts[id(o.turn)] for o in others), abs=1e-4)


def test_turns_have_the_advantage_of_what_came_after_them() -> None:
    turns = tuple(Turn((1,), (2,), (-1.0,), (0,), "stop", reward=reward) for reward in (1.0, None, 2.0))
    other = Turn((1,), (3,), (-1.0,), (0,), "stop")
    group = Group(GroupKey(0, 0), "0", (Experience("0", 0, turns, 1.0), Experience("0", 1, (other,), 0.0)))
    raw = rft.REINFORCE(credit="turn")
    assert [turn.advantage for turn in weighted_turns([group], raw, max_new_tokens=4)] == [4.0, 3.0, 3.0]
    relative = weighted_turns([group], rft.DrGRPO(credit="turn"), max_new_tokens=4)
    assert [turn.advantage for turn in relative] == [1.5, 0.5, 0.5, -2.5]


def test_a_penalty_in_the_reward_is_that_of_the_sample() -> None:
    group = make_batch(5)[0]
    turns = sampled_turns([group])
    objective = rft.REINFORCE(kl=rft.KL(0.5, "k1", "reward"))
    reference = [turn.turn.logprobs - 0.25 for turn in turns]
    rewarded = {index: sample.reward for index, sample in enumerate(group.experiences)}
    for turn in weighted_turns([group], objective, max_new_tokens=4, reference=reference):
        assert turn.advantage == pytest.approx(rewarded[turn.sample] - 0.5 * 0.25 * turn.sample_tokens, abs=1e-4)


def test_truncated_samples_have_no_weight_and_yet_an_advantage() -> None:
    cut, whole = (Turn((1,), (2, 3), (-1.0,) * 2, (0, 0), reason) for reason in ("length", "stop"))
    group = Group(GroupKey(0, 0), "0", (Experience("0", 0, (cut,), 1.0), Experience("0", 1, (whole,), 0.0)))
    (turn,) = weighted_turns([group], rft.DAPO(), max_new_tokens=4)
    assert turn.sample == 1 and turn.weight == 1 / 2  # of two tokens that are left
    assert turn.advantage < 0
