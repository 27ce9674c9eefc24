"""Group-relative advantages, by hand and by property."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rft.trainer.objectives.advantages import (
    BatchRelative,
    GroupRelative,
    LeaveOneOut,
    Raw,
    relative,
)

SCORES = st.floats(-100, 100, width=32)
ALL = [GroupRelative(), GroupRelative(scale="batch"), GroupRelative(scale=None), LeaveOneOut(), BatchRelative(), Raw()]


def group_relative(rewards, groups, scale=True, eps=1e-4):
    return relative(rewards, groups, groups if scale else None, eps)


def test_by_hand():
    rewards = torch.tensor([1.0, 7.0, 0.0, 3.0, 2.0])
    groups = torch.tensor([4, -9, 4, -9, 4])
    torch.testing.assert_close(group_relative(rewards, groups, scale=False), torch.tensor([0.0, 2.0, -1.0, -2.0, 1.0]))
    # Unbiased deviations: 1 and sqrt(8).
    expected = torch.tensor([0.0, 2 / (8**0.5 + 0.5), -1 / 1.5, -2 / (8**0.5 + 0.5), 1 / 1.5])
    torch.testing.assert_close(group_relative(rewards, groups, eps=0.5), expected)


def test_default_eps():
    advantages = group_relative(torch.tensor([0.0, 2e-4]), torch.tensor([0, 0]))
    deviation = 2e-4 / 2**0.5
    torch.testing.assert_close(advantages, torch.tensor([-1e-4, 1e-4]) / (deviation + 1e-4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(score=SCORES, size=st.integers(1, 12))
def test_equal_rewards_give_exactly_zero(score, size, dtype):
    rewards = torch.full((size + 2,), score / 3, dtype=dtype)
    rewards[-2:] = torch.tensor([0.0, 1.0])
    groups = torch.tensor([0] * size + [1, 1])
    assert group_relative(rewards, groups, eps=1e-30)[:size].tolist() == [0.0] * size


def test_rounded_mean_of_equal_rewards_gives_exactly_zero():
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert rewards.sum() / 3 != rewards[0]
    assert group_relative(rewards, torch.zeros(3, dtype=torch.int64), scale=False).tolist() == [0.0] * 3


@given(st.lists(st.tuples(SCORES, st.integers(0, 3)), min_size=1, max_size=24), st.booleans(), st.randoms())
def test_each_group_stands_alone(samples, scale, random):
    rewards = torch.tensor([score for score, _ in samples], dtype=torch.float64)
    groups = torch.tensor([group for _, group in samples])
    advantages = group_relative(rewards, groups, scale=scale)
    assert advantages.dtype == torch.float64
    for group in groups.unique():
        here = groups == group
        own = group_relative(rewards[here], groups[here], scale=scale)
        torch.testing.assert_close(advantages[here], own)
        assert abs(own.sum().item()) < 1e-8
        if scale and len(own) > 1:
            assert own.std() < 1 + 1e-9
        order = rewards[here].argsort()
        assert (own[order].diff() >= -1e-12).all()  # a better reward never has a worse advantage
    shuffled = list(range(len(samples)))
    random.shuffle(shuffled)
    torch.testing.assert_close(group_relative(rewards[shuffled], groups[shuffled], scale=scale), advantages[shuffled])


@given(st.lists(SCORES, min_size=2, max_size=8), st.floats(-10, 10))
def test_shifting_all_rewards_changes_nothing(scores, shift):
    rewards = torch.tensor(scores, dtype=torch.float64)
    groups = torch.zeros(len(scores), dtype=torch.int64)
    moved = group_relative(rewards + shift, groups, scale=False)
    torch.testing.assert_close(moved, group_relative(rewards, groups, scale=False), atol=1e-9, rtol=0)


def test_integer_rewards_become_float32_and_nothing_has_a_gradient():
    assert group_relative(torch.tensor([0, 1]), torch.tensor([0, 0]), scale=False).tolist() == [-0.5, 0.5]
    assert group_relative(torch.tensor([0, 1]), torch.tensor([0, 0])).dtype == torch.float32
    rewards = torch.tensor([0.0, 1.0], requires_grad=True)
    assert not group_relative(rewards, torch.tensor([0, 0])).requires_grad


# The others


def test_the_others_by_hand():
    rewards = torch.tensor([0.0, 1.0, 5.0, 6.0, 10.0])
    groups = torch.tensor([0, 0, 1, 1, 1])
    torch.testing.assert_close(LeaveOneOut()(rewards, groups), torch.tensor([-1.0, 1.0, -3.0, -1.5, 4.5]))
    deviation = rewards.std() + 1e-4
    torch.testing.assert_close(
        GroupRelative(scale="batch")(rewards, groups), torch.tensor([-0.5, 0.5, -2.0, -1.0, 3.0]) / deviation
    )
    torch.testing.assert_close(BatchRelative()(rewards, groups), (rewards - rewards.mean()) / deviation)
    assert Raw(1.0)(rewards, groups).tolist() == [-1.0, 0.0, 4.0, 5.0, 9.0]
    assert GroupRelative(scale=None, shift=0.5)(rewards, groups).tolist() == [0.0, 1.0, -1.5, -0.5, 3.5]


@pytest.mark.parametrize("advantage", ALL, ids=repr)
@given(
    samples=st.lists(st.tuples(SCORES, st.integers(0, 3)), min_size=2, max_size=12),
    shift=st.floats(-10, 10),
    random=st.randoms(),
)
def test_shift_and_order_change_nothing(advantage, samples, shift, random):
    rewards = torch.tensor([score for score, _ in samples], dtype=torch.float64)
    groups = torch.tensor([group for _, group in samples])
    values = advantage(rewards, groups)
    order = torch.tensor(random.sample(range(len(samples)), len(samples)))
    torch.testing.assert_close(advantage(rewards[order], groups[order]), values[order], atol=1e-9, rtol=1e-9)
    if not isinstance(advantage, Raw):
        # a deviation that is as small as what the shift rounds off says nothing
        tolerance = 1e-6 if rewards.std() > 1e-3 else 1.0
        torch.testing.assert_close(advantage(rewards + shift, groups), values, atol=tolerance, rtol=1e-6)


@pytest.mark.parametrize("advantage", ALL, ids=repr)
@given(scores=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6))
def test_any_finite_rewards_give_finite_advantages(advantage, scores):
    rewards = torch.tensor(scores, dtype=torch.float64)
    values = advantage(rewards / (2 * len(scores)), torch.zeros(len(scores), dtype=torch.long))
    assert values.isfinite().all()
