"""Loss terms against values worked out by hand."""

import math

import pytest
import torch

from lightning_rft.trainer.objectives.losses import clipped_surrogate, importance_ratio, kl_k3


def test_importance_ratio():
    logprobs = torch.log(torch.tensor([0.5, 0.2, 0.3]))
    sampling = torch.log(torch.tensor([0.25, 0.4, 0.3]))
    torch.testing.assert_close(importance_ratio(logprobs, sampling), torch.tensor([2.0, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "gradient"),
    [
        (1.0, 2.0, -2.0, False, -2.0),
        (1.25, 2.0, -2.5, False, -2.0),
        (1.5, 2.0, -2.6, True, 0.0),  # already likelier by more than clip_high
        (0.5, 2.0, -1.0, False, -2.0),  # far below, but pulled up again
        (0.5, -2.0, 1.6, True, 0.0),  # already less likely by more than clip_low
        (0.9, -2.0, 1.8, False, 2.0),
        (1.5, -2.0, 3.0, False, 2.0),  # far above, and pulled down again
        (1.5, 0.0, 0.0, False, 0.0),
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, clipped, gradient):
    ratio = torch.tensor([ratio], requires_grad=True)
    value, mask = clipped_surrogate(ratio, torch.tensor([advantage]), clip_low=0.2, clip_high=0.3)
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert mask.tolist() == [clipped]
    assert ratio.grad.item() == pytest.approx(gradient)


def test_kl_k3_by_hand():
    logprobs, sampling = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -3.0, -2.0])
    torch.testing.assert_close(kl_k3(logprobs, sampling), torch.tensor([0.0, math.e - 2, 1 / math.e]))


def test_kl_k3_has_the_right_direction():
    sampling, training = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expected = (sampling * kl_k3(training.log(), sampling.log())).sum()
    torch.testing.assert_close(expected, (sampling * (sampling.log() - training.log())).sum())
    assert (kl_k3(training.log(), sampling.log()) >= 0).all()


def test_kl_k3_of_a_small_difference_is_precise():
    logprobs, sampling = torch.tensor([-0.001], dtype=torch.float32), torch.tensor([0.0])
    assert kl_k3(logprobs, sampling).item() == pytest.approx(5e-7, rel=1e-3)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_extreme_ratios_stay_finite(gap, advantage):
    logprobs = torch.tensor([-300.0 + gap], requires_grad=True)
    ratio = importance_ratio(logprobs, torch.tensor([-300.0]))
    loss, _ = clipped_surrogate(ratio, torch.tensor([advantage]), 0.2, 0.2)
    (loss + kl_k3(logprobs, torch.tensor([-300.0]))).sum().backward()
    assert loss.isfinite().all() and logprobs.grad.isfinite().all()
