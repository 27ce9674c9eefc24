"""What is sampled from a part of the vocabulary has on-policy ratios of 1, however training computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lightning_rft as rft
from lightning_rft.explorer.engines.requests import Completion
from tests.exact_sampling import REMOVALS, TRUNCATIONS, drain, gap, masses, naive, paths, requests, turns
from tests.test_on_policy import Watched
from tests.trainer_and_data import fake_data, pool_of, quiet_trainer

SAME, NAIVE = 1e-4, 0.1
WAYS = TRUNCATIONS | REMOVALS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def done(tiny_model_path: Path) -> dict[str, Completion]:
    engine = rft.TransformersEngine(dtype="float32", device="cpu")
    engine.start(str(tiny_model_path), max_model_len=256, seed=0)
    done = drain(engine, requests(WAYS))
    engine.stop()
    return done


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()


@pytest.mark.parametrize("way", WAYS)
def test_ratios_are_one_and_naive_ones_are_not(way: str, done: dict[str, Completion], model: Any) -> None:
    sampled = turns(requests({way: WAYS[way]}), done)
    for name, path in paths(model).items():
        for max_tokens in (None, 40):
            assert gap(model, path, sampled, max_tokens) < SAME, name
        assert gap(model, path, naive(sampled)) > NAIVE, name


@pytest.mark.parametrize("way", WAYS)
def test_what_is_stored_is_all_that_could_be_sampled(way: str, done: dict[str, Completion]) -> None:
    for request in requests({way: WAYS[way]}):
        one, top_k = done[request.id], WAYS[way].top_k
        assert one.support is not None and top_k is not None
        torch.testing.assert_close(masses(one), torch.ones(len(one.token_ids)))
        counts = one.support.counts.tolist()
        assert max(counts) <= top_k
        split = torch.tensor(one.support.token_ids.tolist()).split(counts)
        assert all(token in ids for token, ids in zip(one.token_ids, split, strict=True))


def test_several_ways_and_none_share_a_batch(done: dict[str, Completion], model: Any, tiny_model_path: Path) -> None:
    ways = WAYS | {"all": rft.Sampling(8, 1.0), "greedy": rft.Sampling(8, 0.0, top_k=8, min_p=0.5)}
    engine = rft.TransformersEngine(dtype="float32", device="cpu")
    engine.start(str(tiny_model_path), max_model_len=256, seed=0)
    together = drain(engine, requests(ways))
    engine.stop()
    for name, alone in done.items():
        assert together[name].token_ids == alone.token_ids
    assert all(one.support is None for name, one in together.items() if name.startswith(("all", "greedy")))
    sampled = turns(requests(WAYS | {"all": ways["all"]}), together)
    for name, path in paths(model).items():
        assert gap(model, path, sampled) < SAME, name


def test_the_loop_trains_what_it_sampled_so(tiny_model_path: Path, tmp_path: Path) -> None:
    """Through explorer, buffer and training step, with a reference policy, at settings of the run and of a call."""

    async def workflow(task: rft.Task, policy: rft.Policy) -> str:
        await policy(task.prompt, top_k=0, top_p=1.0)  # from the whole vocabulary, beside the others
        return await policy(task.prompt, max_new_tokens=5, stop=["a", "b"])

    objective = Watched(kl=rft.KL(0.1))
    module = rft.RFTModule(
        tiny_model_path, objective=objective, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3)
    )
    data = fake_data(
        tasks=[f"{index} + {index} =" for index in range(9)],
        reward=lambda completion, task: float(len(completion) % 3),
        engine=rft.TransformersEngine(dtype="float32", device="cpu"),
        workflow=workflow,
        tasks_per_step=3,
        samples_per_task=3,
        max_new_tokens=8,
        sampling=rft.Sampling(temperature=0.8, top_k=20, top_p=0.8),
    )
    trainer = quiet_trainer(tmp_path, rft.Synchronous(), max_epochs=1)
    trainer.fit(module, data)
    assert trainer.global_step == 3
    assert len(objective.differences) == 3 and max(objective.differences) <= SAME
    assert 0 < trainer.callback_metrics["rft/reference_kl"] < 5  # nats: over another support there is no bound
    assert not pool_of(data).running
