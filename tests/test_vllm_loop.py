"""The whole loop with the real engine: a token's version is what sampled it, and that is what the trainer trains.

Rule 3 holds for every strategy with either transport. Every version of the weights is kept, and every token that was
trained is computed again with the version that it says. A version that was not loaded whole, a cache of older weights,
or a swap in mid-generation that is off by one token shows in its log-prob. So it is for samples that are trees of
calls, and for those of an agent framework whose calls a grammar shapes.

All runs of a dtype share their explorers, since vLLM takes long to start.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning as L
import pytest
import torch

import lightning_rft as rft
from tests.adding_agent import NUMBERS, AddingAgent
from tests.halfway_engines import HalfwayVLLMEngine
from tests.recomputed_tokens import Keep, run
from tests.trained_once import Recorded, check_logprobs, check_once, check_trees
from tests.trainer_and_data import fake_data, quiet_trainer
from tests.wandering import Chosen, wander

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]

STEPS = 6
SAME, OTHER = 1e-3, 1e-2
STRATEGIES = {
    "a": lambda transport: rft.Synchronous(transport=transport),
    "b": lambda transport: rft.OneStepOffPolicy(transport=transport),
    "c": lambda transport: rft.FullyAsynchronous(max_staleness=3, transport=transport),
    "d": lambda transport: rft.MultiExplorerAsynchronous(max_staleness=3, transport=transport),
}
TRANSPORTS = {"collective": rft.CollectiveTransport, "checkpoint": rft.CheckpointTransport}
HALF = rft.Raw(0.5)


def made(bf16_units: bool, explorers: int, folder: Path) -> Iterator[rft.RFTDataModule]:
    engine = HalfwayVLLMEngine()
    engine.switch = folder / "wait"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_RFT_BF16", str(int(bf16_units)))  # decides the engine's dtype
        data = fake_data(
            tasks=[f"{i} + 1 =" for i in range(3 * STEPS)],
            val_tasks=["1 + 1 =", "2 + 2 ="],
            reward=lambda completion, task: 1.0 + sum(character.isalpha() for character in completion),
            engine=engine,
            workflow=Chosen(folder),
            explorers=explorers,
            tasks_per_step=3,
            samples_per_task=3,
            max_new_tokens=60,
        )
        with data:
            yield data


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rft.RFTDataModule]:
    yield from made(False, 2, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rft.RFTDataModule]:
    yield from made(True, 1, tmp_path_factory.mktemp("engine"))


def chosen(data: rft.RFTDataModule) -> Chosen:
    assert isinstance(data.workflow, Chosen)
    return data.workflow


def halfway(data: rft.RFTDataModule, wait: bool) -> None:
    engine = data.engine
    assert isinstance(engine, HalfwayVLLMEngine)
    engine.switch.touch() if wait else engine.switch.unlink(missing_ok=True)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_token_is_of_the_version_that_it_says(
    name: str, transport: str, in_float32: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    strategy = STRATEGIES[name](TRANSPORTS[transport]())
    halfway(in_float32, strategy.in_flight)
    keep, gaps = run(strategy, in_float32, tiny_model_path, tmp_path, steps=STEPS)
    assert len(keep.turns) == 9 * STEPS
    assert max(gaps.own) <= SAME
    assert median(gaps.other) > OTHER, "one version more must show"
    assert bool(gaps.mixed) == strategy.in_flight, f"{gaps.mixed} turns of more than one version"


def test_a_swap_in_bfloat16(in_bfloat16: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    halfway(in_bfloat16, True)
    _, gaps = run(rft.FullyAsynchronous(max_staleness=3), in_bfloat16, tiny_model_path, tmp_path, steps=STEPS)
    assert gaps.mixed
    assert mean(gaps.kl) < 1e-2


@dataclass(frozen=True)
class Gap(rft.GRPO):
    """GRPO that reports the gap it sees, in every sample."""

    advantage: rft.Advantage = HALF
    gaps: list[float] = field(default_factory=list)
    skips_zero_advantage = False

    def token_loss(self, tokens: rft.TokenBatch) -> Any:
        self.gaps.append(float((tokens.logprobs.detach() - tokens.sampling_logprobs).abs().max()))
        return super().token_loss(tokens)


class Note(L.Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("peft_config", [None, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}])
@pytest.mark.parametrize("bf16_units", [False, True])
def test_vllm_samples_with_the_weights_that_are_trained(
    request: pytest.FixtureRequest, tiny_model_path: Path, tmp_path: Path, bf16_units: bool, peft_config: Any
) -> None:
    """Those of a whole model, or of one with an adapter."""
    if peft_config:
        pytest.importorskip("peft")
    data: rft.RFTDataModule = request.getfixturevalue("in_bfloat16" if bf16_units else "in_float32")
    halfway(data, False)
    objective, note = Gap(), Note()
    module = rft.RFTModule(tiny_model_path, objective, lambda p: torch.optim.AdamW(p, lr=3e-3), peft_config=peft_config)
    trainer = quiet_trainer(
        tmp_path, rft.Synchronous(), note, max_steps=4, limit_val_batches=None, val_check_interval=4
    )
    trainer.fit(module, data)
    assert trainer.global_step == trainer.callback_metrics["val/version"] == len(note.logged) == 4
    assert max(step["rft/kl"] for step in note.logged) < (1e-2 if bf16_units else 1e-6)
    assert (max(step["rft/push_gap"] for step in note.logged) > 1e-3) == bf16_units
    changed = [step["rft/weights_changed"] for step in note.logged]
    assert min(changed) > 0.1, "the weights must change visibly in the engine's dtype for this to mean anything"
    if bf16_units:
        assert min(objective.gaps) > 1e-3, "the engine computes in float32"
    else:
        assert max(objective.gaps) < SAME


@dataclass
class Once:
    """A run of which every token was trained once, in a folder of its own."""

    folder: Path
    module: rft.RFTModule
    keep: Keep = field(default_factory=Keep)
    objective: Recorded = field(default_factory=Recorded)

    @classmethod
    def fit(cls, strategy: rft.SyncStrategy, data: rft.RFTDataModule, model: Path, folder: Path, steps: int) -> Once:
        objective = Recorded()
        module = rft.RFTModule(model, objective, lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
        once = cls(folder, module, objective=objective)
        quiet_trainer(folder, once.keep, strategy, max_steps=steps).fit(module, data)
        assert len(once.keep.samples) == 9 * steps
        check_once(once.keep, objective, once.buffer)
        return once

    @property
    def buffer(self) -> Path:
        return self.folder / "rft" / "buffer.sqlite"


def test_trees_of_calls_are_trained_once_with_their_own_versions(
    in_float32: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    halfway(in_float32, True)
    with chosen(in_float32).as_(wander):
        once = Once.fit(rft.FullyAsynchronous(max_staleness=3), in_float32, tiny_model_path, tmp_path, STEPS)
    check_trees(once.keep)
    check_logprobs(once.keep, once.module.policy, 3, SAME)


@pytest.fixture(scope="module")
def of_agents(
    in_float32: rft.RFTDataModule, tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Once, list[dict[str, Any]]]:
    """A run in which an agent framework makes the calls, and what its HTTP client wrote down of each sample."""
    pytest.importorskip("openai")
    pytest.importorskip("pydantic_ai")
    halfway(in_float32, False)
    folder, heard = tmp_path_factory.mktemp("agents"), tmp_path_factory.mktemp("heard")
    sampling = rft.Sampling(max_new_tokens=100, top_k=64).filled(in_float32.sampling)
    with pytest.MonkeyPatch.context() as patch, chosen(in_float32).as_(AddingAgent(heard)):
        patch.setattr(in_float32, "sampling", sampling)
        once = Once.fit(rft.Synchronous(), in_float32, tiny_model_path, folder, 2)
    return once, [json.loads(path.read_text()) for path in heard.iterdir()]


def test_the_ledger_holds_the_calls_of_an_agent_framework(of_agents: tuple[Once, list[dict[str, Any]]]) -> None:
    """Exactly those that its client heard of, token for token."""
    once, heard = of_agents

    def as_one(prompts: Any, answers: Any) -> tuple[Any, ...]:
        return tuple(zip(map(tuple, prompts), map(tuple, answers), strict=True))

    said = [(sample["task"], [said for _, said in sample["calls"]]) for sample in heard]
    calls = Counter(
        (task, as_one([one["prompt_token_ids"] for one in of], [one["choices"][0]["token_ids"] for one in of]))
        for task, of in said
    )
    rows = list(rft.read_buffer(once.buffer))
    assert Counter((row["task_id"], as_one(row["prompt_ids"], row["token_ids"])) for row in rows) == calls
    assert calls.total() == 18 and {row["state"] for row in rows} == {"trained"}
    assert max(len(of) for _, of in said) > 2
    for sample in once.keep.samples:  # the conversation, and a call beside it
        *conversation, beside = [turn.parent for turn in sample.turns]
        assert conversation == [None, *range(len(conversation) - 1)] and beside is None
        assert sample.metrics["drift"] == sample.metrics["endpoint_unparsed"] == 0


def test_a_tool_that_must_be_called_is_called(of_agents: tuple[Once, list[dict[str, Any]]]) -> None:
    """By a model that knows nothing, since vLLM's grammar leaves it nothing else to say."""
    kinds = set()
    for sample in of_agents[1]:
        called = []
        for asked, said in sample["calls"]:
            (choice,) = said["choices"]
            (call,) = choice["message"]["tool_calls"]
            assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
            arguments, name = json.loads(call["function"]["arguments"]), call["function"]["name"]
            if asked["tool_choice"] == "required":
                kinds.add(("required", name))
            else:
                kinds.add(("named", asked["tool_choice"]["function"]["name"]))
                assert name == asked["tool_choice"]["function"]["name"]
            if name == "add":
                assert list(arguments) == ["a", "b"] and set(arguments.values()) <= set(NUMBERS)
                called.append(list(arguments.values()))
            else:
                assert list(arguments) == ["total"] and 2 <= arguments["total"] <= 6
        assert sample["sums"] == called[:-1]  # the tool ran, but for the call that was asked for by name
    assert kinds == {("required", "add"), ("required", "final_result"), ("named", "add")}


def test_what_a_grammar_forces_is_not_trained(of_agents: tuple[Once, list[dict[str, Any]]]) -> None:
    once, _ = of_agents
    turns = once.keep.turns
    forced = sum(turn.num_tokens - turn.num_free for turn in turns)
    chosen = sum(turn.num_free for turn in turns)
    assert len(once.objective.trained) == chosen < forced  # most of a call's JSON has no alternative
    assert min(turn.num_free for turn in turns) >= 1
    assert max(once.objective.trained) < 0.0
