"""The metrics of a batch, against values computed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.monitor.metrics import BatchMetrics
from lightning_rft.monitor.scores import Scored, score_metrics


def sample(
    index: int,
    reward: float,
    logprobs: tuple[float, ...],
    versions: tuple[int, ...],
    reason: str = "stop",
    metrics: Mapping[str, float] | None = None,
    **parts: float,
) -> Experience:
    turn = Turn((1, 2), range(len(logprobs)), logprobs, versions, reason)
    return Experience("7", index, (turn,), reward, rewards=parts, metrics=metrics or {})


def group(slot: int, *experiences: Experience) -> Group:
    return Group(GroupKey(0, slot), "7", experiences)


GROUPS = [
    group(
        0,
        sample(0, 1.0, (-1.0, -2.0), (3, 3), right=1.0, form=0.5, metrics={"calls": 2.0}),
        sample(1, 0.0, (-3.0,), (3,), reason="length", right=0.0, metrics={"calls": 3.0, "reward": 7.0}),
    ),
    group(1, sample(0, 2.0, (0.0, 0.0, -4.0, -2.0), (2, 3, 4, 4)), sample(1, 2.0, (-1.0,), (4,), reason="length")),
]
EXPECTED = {
    "rft/reward": 1.25,
    "rft/reward_std": math.sqrt(0.5) / 2,
    "rft/reward_form": 0.5,
    "rft/reward_right": 0.5,
    "rft/workflow_calls": 2.5,
    "rft/workflow_reward": 7.0,  # beside that of the batch
    "rft/group_reward_min": 1.0,
    "rft/group_reward_max": 1.5,
    "rft/groups_without_signal": 0.5,
    "rft/completion_length": 2.0,
    "rft/completion_length_min": 1.0,
    "rft/completion_length_max": 4.0,
    "rft/truncated_share": 0.5,
    "rft/sampling_entropy": 13 / 8,
    "rft/staleness_mean": 4 - 26 / 8,
    "rft/staleness_max": 2.0,
}


def test_what_groups_say_of_a_batch() -> None:
    metrics = BatchMetrics()
    metrics.update_groups(GROUPS, version=4)
    assert metrics.collect() == pytest.approx(EXPECTED | {"rft/loss": 0.0, "rft/trained_share": 0.0})
    assert metrics.collect().keys() == {"rft/loss", "rft/tokens_per_second"}  # nothing is left for the next batch


def test_what_is_computed_of_trained_tokens_alone() -> None:
    metrics = BatchMetrics()
    metrics.update_groups(GROUPS, version=4)
    metrics.update_loss(torch.tensor(0.25))
    metrics.update_loss(torch.tensor(0.5))
    metrics.update_tokens(torch.tensor([1.0, 2.0]), {"kl": torch.tensor([0.5, 0.0])})
    metrics.update_tokens(torch.tensor([6.0]), {"kl": torch.tensor([0.25])})
    metrics.update_tokens(torch.tensor([99.0]), {"kl": torch.tensor([99.0])}, weight=0.0)  # of a rank without work
    values = metrics.collect()
    computed = {"rft/loss": 0.75, "rft/entropy": 3.0, "rft/kl": 0.25, "rft/trained_share": 3 / 8}
    assert {name: values[name] for name in computed} == pytest.approx(computed)
    assert EXPECTED.keys() <= values.keys()


def test_no_name_is_a_folder_of_another() -> None:
    metrics = BatchMetrics()
    metrics.update_groups(GROUPS, version=4)
    metrics.update_tokens(torch.tensor([1.0]), {"kl": torch.tensor([0.5])})
    metrics.update_gap(torch.tensor([0.5]), torch.tensor([True]))
    names = metrics.collect()
    assert not [(one, other) for one in names for other in names if other.startswith(f"{one}/")]


def test_the_log_probs_of_what_is_sampled_estimate_the_entropy() -> None:
    """Groups without signal are left out of training, and are those of which the policy is surest."""
    torch.manual_seed(0)
    policy = torch.distributions.Categorical(logits=torch.tensor([0.0, 1.0, 2.0, -1.0]))
    drawn = policy.sample((20_000,))
    turn = Turn((1,), drawn.tolist(), policy.log_prob(drawn).tolist(), [0] * len(drawn), "stop")
    metrics = BatchMetrics()
    metrics.update_groups([group(0, Experience("7", 0, (turn,), 1.0))], version=0)
    assert metrics.collect()["rft/sampling_entropy"] == pytest.approx(float(policy.entropy()), abs=0.02)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), min_size=1, max_size=5))
def test_spread_and_extremes_are_torchs(rewards: list[list[float]]) -> None:
    values = score_metrics([[Scored(reward, {}, 1, "stop") for reward in group] for group in rewards])
    tensors = [torch.tensor(group, dtype=torch.float64) for group in rewards]
    spread = [float(group.std()) if len(group) > 1 else 0.0 for group in tensors]
    assert values["rft/reward_std"] == pytest.approx(sum(spread) / len(spread), abs=1e-6)
    assert values["rft/group_reward_min"] <= values["rft/group_reward_max"]


def test_rewards_beyond_all_bounds_raise_nothing() -> None:
    huge = [Scored(1.7e308, {}, 1, "stop"), Scored(-1.7e308, {}, 1, "stop"), Scored(1.7e308, {"a": 1.7e308}, 1, "stop")]
    values = score_metrics([huge, huge[::-1]])
    assert values["rft/reward_std"] == math.inf and values["rft/completion_length"] == 1.0


@pytest.mark.parametrize("name", ["std", "", "a/b", "a b", "pass@1", "ü", "x" * 65, "a\n"])
def test_names_that_loggers_refuse_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="a part of the reward is named"):
        sample(0, 1.0, (-1.0,), (0,), **{name: 1.0})
    with pytest.raises(ConfigurationError, match="a metric is named"):
        sample(0, 1.0, (-1.0,), (0,), metrics={name: 1.0})


@pytest.mark.parametrize("name", ["stdev", "min", "a.b-c_1", "std.x"])
def test_other_names_are_taken(name: str) -> None:
    assert sample(0, 1.0, (-1.0,), (0,), **{name: 1.0}).rewards == {name: 1.0}
