"""Objectives as their callers see them."""

import dataclasses

import jsonargparse
import pytest
import torch

from lightning_rft.errors import ConfigurationError
from lightning_rft.trainer.objectives.grpo import GRPO
from lightning_rft.trainer.objectives.objective import Objective


def test_token_loss_by_hand():
    sampling = torch.log(torch.tensor([0.4, 0.4, 0.4, 0.4]))
    logprobs = torch.log(torch.tensor([0.4, 0.6, 0.2, 0.6])).requires_grad_()
    loss, statistics = GRPO(clip_low=0.2, clip_high=0.3).token_loss(
        logprobs, sampling, torch.tensor([2.0, 2.0, -1.0, -1.0])
    )
    torch.testing.assert_close(loss, torch.tensor([-2.0, -2.6, 0.8, 1.5]))
    assert statistics["clip_fraction"].tolist() == [0.0, 1.0, 1.0, 0.0]
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5])
    torch.testing.assert_close(statistics["kl"], ratio - 1 - ratio.log())
    assert not any(value.requires_grad for value in statistics.values())
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.0, 0.0, 0.0, 1.5]))


def test_on_policy_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, statistics = GRPO().token_loss(logprobs, logprobs.detach(), torch.tensor([0.5, -3.0]))
    loss.sum().backward()
    assert logprobs.grad.tolist() == [-0.5, 3.0]
    assert statistics["kl"].tolist() == [0.0, 0.0]


def test_advantages_follow_scale_rewards():
    rewards, groups = torch.tensor([0.0, 4.0, 9.0]), torch.tensor([0, 0, 1])
    assert GRPO(scale_rewards=False).advantages(rewards, groups).tolist() == [-2.0, 2.0, 0.0]
    scaled = torch.tensor([-2.0, 2.0, 0.0]) / (8**0.5 + 1e-4)
    torch.testing.assert_close(GRPO().advantages(rewards, groups), scaled)


def test_promises_hold():
    objective = GRPO()
    assert objective.needs_group
    assert objective.skips_zero_advantage
    logprobs = torch.tensor([-1.0, -9.0], requires_grad=True)
    loss, _ = objective.token_loss(logprobs, torch.tensor([-3.0, -1.0]), torch.zeros(2))
    loss.sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("clip_low", 0.0), ("clip_low", 1.1), ("clip_low", float("nan")), ("clip_high", 0.0), ("clip_high", float("nan"))],
)
def test_bad_clipping_range_is_refused_by_name(setting, value):
    with pytest.raises(ConfigurationError, match=setting):
        GRPO(**{setting: value})


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GRPO().clip_low = 0.1


def test_objective_can_be_named_in_a_config():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    arguments = ["--objective=lightning_rft.trainer.objectives.grpo.GRPO", "--objective.clip_high=0.28"]
    built = parser.instantiate(parser.parse_args(arguments)).objective
    assert built == GRPO(clip_high=0.28)


def test_custom_objective_is_a_small_subclass():
    @dataclasses.dataclass(frozen=True)
    class Reinforce(Objective):
        needs_group = False
        skips_zero_advantage = True

        def advantages(self, rewards, groups):
            return rewards

        def token_loss(self, logprobs, sampling_logprobs, advantages):
            return -advantages * logprobs, {}

    assert Reinforce().token_loss(torch.tensor([-2.0]), torch.tensor([-2.0]), torch.tensor([3.0]))[0].item() == 6.0
    with pytest.raises(TypeError, match="abstract"):
        Objective()
