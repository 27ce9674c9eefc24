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
from lightning_rft.trainer.layout import layout
from lightning_rft.trainer.lines import Lines
from lightning_rft.trainer.micro_batches import by_group, micro_batches, split_samples
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.packing import pack
from lightning_rft.trainer.passes import with_drift
from lightning_rft.trainer.weighted import WeightedTurn, sampled_turns, token_batch, weighted_turns
from tests.trainer.agents import agents, lines_of
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


def make_agents(seed: int) -> list[Group]:
    """Groups of samples whose calls make trees; calls of different samples are equal or go on from one another."""
    draw = random.Random(seed)
    groups = []
    for slot in range(draw.randint(1, 3)):
        turns = [
            Turn(
                turn.prompt_ids,
                turn.token_ids,
                [-draw.uniform(4.2, 5.2) for _ in range(turn.num_tokens)],
                (0,) * turn.num_tokens,
                draw.choice(["stop", "stop", "length"]),
                reward=draw.choice([None, 1.0]),
            )
            for turn in agents(draw, ids=range(5, 9))
        ]
        cuts = sorted(draw.randint(0, len(turns)) for _ in range(2))
        samples = [turns[: cuts[0]], turns[cuts[0] : cuts[1]], turns[cuts[1] :]]
        made = [Experience(str(slot), i, tuple(some), float(draw.randint(0, 2))) for i, some in enumerate(samples)]
        groups.append(Group(GroupKey(0, slot), str(slot), tuple(sample for sample in made if sample.turns)))
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
        assert module.fast_path is not None and module.fast_path.shared
        module.fast_path = replace(module.fast_path, shared=kind == "shared")
        made[kind] = module
    return made


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    make=st.sampled_from([make_batch, make_agents]),
    kind=st.sampled_from(["shared", "ordinary"]),
    max_tokens=st.sampled_from([None, 1, 20, 60]),
    parts=st.sampled_from([1, 2, 4]),
    order=st.randoms(),
)
def test_no_cut_changes_the_gradient(
    objective: Objective,
    modules: dict[str, SteppedModule],
    seed: int,
    make: Callable[[int], list[Group]],
    kind: str,
    max_tokens: int | None,
    parts: int,
    order: random.Random,
) -> None:
    groups = make(seed)
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
    assert module.trainer.micro_batches == sum(len(lines_of(group)) for group in by_group(turns)) > 1


# The pure parts

COLUMNS: Callable[[Lines], int] = lambda lines: int(lines.lengths.sum())  # noqa: E731


def begun(pieces: list[list[WeightedTurn]]) -> int:
    """Columns of all lines, each in as many micro-batches as have turns that lie in it."""
    return sum(len(line) for piece in pieces for group in by_group(piece) for line in lines_of(group))


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    make=st.sampled_from([make_batch, make_agents]),
    shares=st.integers(1, 5),
    max_tokens=st.sampled_from([None, 1, 12, 40]),
    shared=st.booleans(),
)
def test_every_turn_is_in_one_micro_batch_and_shares_are_alike(
    seed: int, make: Callable[[int], list[Group]], shares: int, max_tokens: int | None, shared: bool
) -> None:
    turns = sampled_turns(make(seed))
    columns = lambda lines: layout(lines, shared=shared, balance=1e9).columns  # noqa: E731
    cuts = micro_batches(turns, shares, max_tokens=max_tokens, columns=columns, shared=shared)
    assert len(cuts) == shares
    assert len({len(cut) for cut in cuts}) == 1
    assert len(cuts[0]) <= max(1, -(-len(turns) // shares)), "none is empty but to make shares alike"
    pieces = [piece for cut in cuts for piece in cut]
    dealt = [id(turn.turn) for piece in pieces for turn in piece]
    assert sorted(dealt) == sorted(id(turn.turn) for turn in turns)
    assert begun(pieces) == begun([turns]), "no line is cut"
    for groups in map(by_group, pieces):
        if max_tokens is not None and sum(len(lines_of(group)) for group in groups) > 1:
            assert pack(groups, shared=shared, balance=1e9).input_ids.numel() <= max_tokens


def test_a_conversation_is_moved_whole_and_forks_are_not_held_together() -> None:
    texts = [((1,), (2, 3)), ((1, 2, 3, 4), (5,)), ((1, 2, 3, 4, 5, 6), (7, 8)), ((1, 2, 9), (9, 9)), ((1,), (7, 7))]
    turns = [Turn(prompt, tokens, (0,) * len(tokens), (0,) * len(tokens), "stop") for prompt, tokens in texts]
    weighted = [WeightedTurn(turn, 0, sample, 1) for sample, turn in zip((0, 0, 0, 0, 1), turns, strict=True)]
    for shared in (False, True):
        (pieces,) = micro_batches(weighted, 1, max_tokens=1, columns=COLUMNS, shared=shared)
        assert [[turns.index(turn.turn) for turn in piece] for piece in pieces] == [[0, 1, 2], [3], [4]]
        # one rank computes the conversation of 7 columns, the other the lines of 4 and 2
        shares = micro_batches(weighted, 2, max_tokens=None, columns=COLUMNS, shared=shared)
        assert [[turns.index(turn.turn) for turn in piece] for (piece,) in shares] == [[0, 1, 2], [3, 4]]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), shares=st.integers(2, 4), shared=st.booleans())
def test_shares_have_about_as_many_columns(seed: int, shares: int, shared: bool) -> None:
    draw = random.Random(seed)
    turns = []
    for group in range(16):
        prompt, longest = range(draw.choice([5, 20])), draw.choice([5, 40])
        for sample in range(8):
            turn = make_turn(draw, longest)
            turns.append(WeightedTurn(first_with(turn, prompt), group, 8 * group + sample, turn.num_tokens))
    cuts = micro_batches(
        [turn for turn in turns if turn.turn.num_tokens], shares, max_tokens=None, columns=COLUMNS, shared=shared
    )
    costs = [columns_of(piece, shared) for cut in cuts for piece in cut]
    assert len(costs) == shares
    # a line more or less on either side, and prompts of groups that are cut
    assert max(costs) - min(costs) <= 2 * 60 + 2 * 20


def test_a_long_prompt_is_divided_among_the_lines_that_begin_with_it() -> None:
    turns = [
        WeightedTurn(Turn(range(1000), range(token, token + 101), (0,) * 101, (0,) * 101, "stop"), 0, token, 101)
        for token in range(8)
    ]
    (one,), (other,) = micro_batches(turns, 2, max_tokens=None, columns=COLUMNS, shared=True)
    assert columns_of(one, shared=True) == columns_of(other, shared=True) == 1400


def columns_of(piece: list[WeightedTurn], shared: bool) -> int:
    """Columns of a micro-batch's lines, or of its trees."""
    texts = [line for group in by_group(piece) for line in lines_of(group)]
    if not shared:
        return sum(map(len, texts))
    trees = (lines_of(group) for group in by_group(piece))
    return sum(len({line[:end] for line in tree for end in range(1, len(line) + 1)}) for tree in trees)


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
    group = Group(GroupKey(0, 0), "0", (Experience("0", 0, turns, 4.0), Experience("0", 1, (other,), 0.0)))
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
