"""What explorers compute is what the trainer does: healthy pushes pass, and a layer that did not arrive is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rft.errors import AgreementError
from lightning_rft.explorer.engines.transformers import TransformersEngine
from lightning_rft.model_folder import Pretrained
from lightning_rft.run.agreement import Agreement
from lightning_rft.trainer.scoring import Scores, encoded_text, score
from tests.explorer.links import MemoryLink

HEALTHY_RUNS = 50  # of each dtype
Spoil = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Pair:
    """A trainer's policy, computing in a dtype by autocast, and an engine that computes in it, in one process."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = dtype
        self.policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.ids = encoded_text(Pretrained(str(path)))
        self.engine = TransformersEngine(dtype=dtype, device="cpu")
        self.engine.start(str(path), max_model_len=200, seed=0)
        self.link = MemoryLink()
        self.engine.connect(self.link)
        self.agreement = Agreement(None, lambda: dtype)
        self.before: dict[str, torch.Tensor] = {}

    def scores(self) -> Scores:
        with torch.autocast("cpu", getattr(torch, self.dtype), enabled=self.dtype != "float32"):
            return score(self.policy, self.ids, torch.device("cpu"))

    def push(self, version: int, spoil: Spoil = lambda weights, before: None) -> float:
        """The gap after a push, of weights that ``spoil`` may change on their way, or AgreementError."""
        self.agreement.expect(version, self.scores())
        weights = {
            name: tensor.detach().to(getattr(torch, self.dtype), copy=True)
            for name, tensor in self.policy.state_dict().items()
        }
        spoil(weights, self.before)
        self.before = weights
        self.engine.load(self.link.push(weights), version)
        self.agreement.scored(0, version, self.engine.prompt_logprobs(self.ids))
        return self.agreement.metrics()["rft/push_gap"]

    def update(self, size: float, seed: int) -> None:
        """A step that moves every weight by about ``size`` times the spread of its tensor."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                if parameter.dim() > 1:
                    parameter += size * parameter.std() * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def pair(tiny_model_path: Path, dtype: str) -> Iterator[Pair]:
    found = Pair(tiny_model_path, dtype)
    yield found
    found.engine.stop()


def test_healthy_runs_raise_no_alarm(pair: Pair) -> None:
    """Each push is of other weights, from hardly changed to more noise than signal."""
    first = copy.deepcopy(pair.policy.state_dict())
    for run in range(HEALTHY_RUNS):
        pair.policy.load_state_dict(first)
        pair.update((0.001, 0.01, 0.1, 1.0)[run % 4], seed=run)
        gap = pair.push(run)
        assert gap > 0 or pair.dtype == "float32"


def a_layer(name: str) -> bool:
    return ".layers.0." in name


def scaled(weights: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    for name in filter(a_layer, weights):
        weights[name] *= 1.01


def left_out(weights: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    weights.update({name: before[name] for name in filter(a_layer, weights)})


@pytest.mark.parametrize(("dtype", "spoil"), [("float32", scaled), ("float32", left_out), ("bfloat16", left_out)])
def test_a_layer_that_is_not_the_trainers_is_noticed_at_once(pair: Pair, spoil: Spoil) -> None:
    pair.push(0)
    pair.update(0.3, seed=0)  # which one sees
    with pytest.raises(AgreementError, match=r"explorer 0 computes something else .* after the push of version 1"):
        pair.push(1, spoil)


def test_a_whole_push_that_did_not_arrive_is_noticed(pair: Pair) -> None:
    pair.push(0)
    pair.update(0.3, seed=0)
    with pytest.raises(AgreementError, match=r"Tolerance\(push_gap=...\)"):
        pair.push(1, lambda weights, before: weights.update(before))


def test_scores_know_no_dropout_and_leave_the_modes_as_they_are(tiny_model_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).train()
    expected = score(policy, (1, 2, 3), torch.device("cpu"))
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.model.layers[0].eval()
    drawn = torch.get_rng_state()
    assert score(policy, (1, 2, 3), torch.device("cpu")) == expected
    assert torch.equal(torch.get_rng_state(), drawn)
    assert policy.training and policy.model.layers[1].training and not policy.model.layers[0].training


def test_an_explorer_that_simulates_is_not_asked() -> None:
    agreement = Agreement(None, lambda: "float32")
    agreement.expect(0, Scores((1, 2), (-1.0,), 1.0, "float32"))
    agreement.scored(0, 0, ())
    agreement.sampled(0, gap=5.0)
    assert agreement.metrics() == {}


def test_sampled_tokens_are_compared_too() -> None:
    agreement = Agreement(None, lambda: "float32")
    agreement.expect(0, Scores((1, 2), (-1.0,), 1.0, "float32"))
    agreement.scored(0, 0, (-1.0,))
    agreement.sampled(0, gap=5e-5)
    with pytest.raises(AgreementError, match="the tokens of batch 1 were sampled with the weights that are trained"):
        agreement.sampled(1, gap=0.5)


def test_an_explorer_may_be_faster_than_the_trainer() -> None:
    agreement = Agreement(0.6, lambda: "float32")
    agreement.scored(0, 3, (-1.5,))
    agreement.scored(1, 3, (-9.0,))
    agreement.scored(1, 4, (-1.0,))
    assert agreement.metrics() == {}
    with pytest.raises(AgreementError, match=r"explorer 1 computes something else .* push of version 3"):
        agreement.expect(3, Scores((1, 2), (-1.0,), 1.0, "float32"))
    agreement.expect(4, Scores((1, 2), (-1.25,), 1.0, "float32"))
    assert agreement.metrics() == {"rft/push_gap": 8.0}
    agreement.expect(4, Scores((1, 2), (-1.25,), 1.0, "float32"))  # nothing is compared twice
    assert agreement.metrics() == {}


def test_scores_of_versions_that_nobody_remembers_are_not_kept() -> None:
    agreement = Agreement(0.6, lambda: "float32")
    for version in range(20):
        agreement.expect(version, Scores((1, 2), (-1.0,), 1.0, "float32"))
    agreement.scored(0, 1, (-9.0,))
    assert agreement.metrics() == {} and not agreement._early


def test_what_is_not_a_number_is_no_agreement() -> None:
    agreement = Agreement(0.5, lambda: "float32")
    agreement.expect(0, Scores((1, 2), (-1.0,), 1.0, "float32"))
    with pytest.raises(AgreementError):
        agreement.scored(0, 0, (float("nan"),))


def test_what_is_tolerated_can_be_set() -> None:
    agreement = Agreement(0.6, lambda: "float32")
    agreement.expect(0, Scores((1, 2), (-1.0,), 1.0, "float32"))
    agreement.scored(0, 0, (-1.5,))
    assert agreement.metrics() == {"rft/push_gap": 0.5}
