"""The training step: its loss, its gradient, and what they do not depend on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.model_folder import Pretrained
from lightning_rft.trainer.loader import BatchPart
from lightning_rft.trainer.module import RFTModule
from lightning_rft.trainer.objectives.grpo import GRPO
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.objectives.tokens import TokenBatch
from tests.training_step import SteppedModule as Module

pytestmark = pytest.mark.usefixtures("one_thread")


BY_TOKEN = GRPO(correction=None, normalisation="token")


@pytest.fixture(scope="module")
def module(tiny_model_path: Path) -> Module:
    return Module(tiny_model_path, objective=BY_TOKEN)


def make_group(slot: int, rewards: Sequence[float], longest: int = 12, temperature: float = 1.0) -> Group:
    draw = random.Random(slot)
    prompt = tuple(draw.randrange(5, 100) for _ in range(draw.randint(1, 9)))
    experiences = []
    for sample, reward in enumerate(rewards):
        length = draw.randint(1, longest)
        tokens = tuple(draw.randrange(5, 100) for _ in range(length))
        logprobs = tuple(-draw.uniform(3, 6) for _ in range(length))  # on both sides of the model's own
        turn = Turn(prompt, tokens, logprobs, (0,) * length, "stop", temperature)
        experiences.append(Experience(str(slot), sample, (turn,), float(reward)))
    return Group(GroupKey(0, slot), str(slot), tuple(experiences))


GROUPS = [make_group(0, (0, 1, 3)), make_group(1, (1, 0), 40), make_group(2, (2, 2, 0, 5)), make_group(3, (0, 1), 3)]
FLAT = make_group(4, (1, 1, 1))


def close(gradient: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> bool:
    return bool((gradient - expected).norm() <= relative * expected.norm())


def plain_loss(policy: Any, groups: Sequence[Group], objective: Objective) -> torch.Tensor:
    """Sum of the token losses over all tokens, from one ordinary forward for each sample."""
    losses, tokens = torch.zeros(()), 0
    for group in groups:
        rewards = torch.tensor([experience.reward for experience in group.experiences])
        advantages = objective.advantage(rewards, torch.zeros(len(rewards), dtype=torch.long))
        for experience, advantage in zip(group.experiences, advantages, strict=True):
            (turn,) = experience.turns
            ids = torch.tensor([[*turn.prompt_ids, *turn.token_ids]])
            logits = policy(ids, use_cache=False).logits[0, len(turn.prompt_ids) - 1 : -1] / turn.temperature
            logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(turn.token_ids)[:, None])[:, 0]
            sampled = TokenBatch(
                logprobs,
                torch.tensor(turn.logprobs),
                advantage.expand(len(logprobs)),
                torch.zeros(len(logprobs), dtype=torch.long),
                torch.tensor([len(logprobs)]),
            )
            loss, _ = objective.token_loss(sampled)
            losses, tokens = losses + loss.sum(), tokens + len(logprobs)
    return losses / tokens


WARM = [make_group(5, (0, 1, 3), temperature=0.6), make_group(6, (2, 1), temperature=1.4)]


@pytest.mark.parametrize("groups", [[*GROUPS, FLAT], WARM, [*GROUPS, *WARM]], ids=["at 1", "at two", "at all three"])
def test_loss_and_gradient_are_those_of_plain_forwards(module: Module, groups: list[Group]) -> None:
    gradient = module.step(groups)
    logged = module.logged["rft/loss"]
    module.zero_grad()
    expected = plain_loss(module.policy, groups, BY_TOKEN)
    expected.backward()
    assert logged == pytest.approx(float(expected.detach()), rel=1e-5)
    assert close(gradient, torch.cat([p.grad.reshape(-1) for p in module.parameters()]))  # type: ignore[union-attr]
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("accumulate", [2, 4, 7])
def test_gradient_and_metrics_do_not_depend_on_accumulation(module: Module, accumulate: int) -> None:
    groups = [*GROUPS, FLAT]
    whole, logged = module.step(groups), dict(module.logged)
    module.logged.clear()
    parts = module.step(groups, accumulate)
    assert close(parts, whole)
    for name in ("rft/tokens_per_second", "rft/wait_experience_s"):
        assert logged.pop(name, 0.0) >= 0
        module.logged.pop(name)
    assert logged == pytest.approx(module.logged, rel=1e-4)
    assert logged.keys() >= {"rft/loss", "rft/reward", "rft/kl", "rft/entropy", "rft/clip_fraction"}
    assert 0 < logged["rft/clip_fraction"] < 1


@pytest.mark.parametrize("groups", [[], [FLAT]], ids=["empty", "without signal"])
def test_share_without_work_gives_every_parameter_a_zero_gradient(tiny_model_path: Path, groups: list[Group]) -> None:
    module = Module(tiny_model_path)
    module.step([])  # tries the model, once
    assert module.policy is not None
    module.policy.forward = None  # type: ignore[assignment]  # it is not called
    module.zero_grad()
    assert all(parameter.grad is None for parameter in module.parameters())
    module.training_step(BatchPart(0, groups, parts=2), 0).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_turns_without_tokens_are_no_work(module: Module) -> None:
    silent = Turn((5, 6), (), (), (), "stop")
    one, other = make_group(7, (1, 0)).experiences
    beside = (replace(one, turns=(silent, *one.turns)), replace(other, turns=(*other.turns, silent)))
    alone = module.step([make_group(7, (1, 0))])
    assert torch.equal(module.step([Group(GroupKey(0, 0), "7", beside)]), alone)
    nothing = Group(GroupKey(0, 0), "7", (replace(one, turns=(silent,)), replace(other, turns=(silent,))))
    for groups in ([nothing], []):
        assert not module.step(groups).any()
        assert module.logged["rft/loss"] == 0.0


def test_groups_without_signal_are_skipped_and_yet_count(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = module.policy.forward  # type: ignore[union-attr]

    def counted(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    module.step([])  # tries the model, once
    monkeypatch.setattr(module.policy, "forward", counted)
    alone = module.step(GROUPS)
    loss = module.logged["rft/loss"]
    beside = module.step([*GROUPS, FLAT])
    share = sum(group.num_tokens for group in GROUPS) / sum(group.num_tokens for group in [*GROUPS, FLAT])
    assert len(rows) == 2 and rows[0] == rows[1]
    assert share < 1
    assert close(beside, alone * share)
    assert module.logged["rft/loss"] == pytest.approx(loss * share, rel=1e-5)
    assert module.logged["rft/completion_length"] == pytest.approx(
        sum(group.num_tokens for group in [*GROUPS, FLAT]) / sum(len(group.experiences) for group in [*GROUPS, FLAT])
    )


def test_batch_without_any_signal_is_logged(module: Module) -> None:
    module.logged.clear()
    assert not module.step([FLAT], parts=2).any()
    assert module.logged["rft/reward"] == 1.0
    assert module.logged["rft/reward_std"] == 0.0
    assert module.logged["rft/loss"] == 0.0
    assert "rft/kl" not in module.logged  # no token was trained


def test_objective_with_another_term_keeps_groups_without_signal(tiny_model_path: Path) -> None:
    @dataclass(frozen=True)
    class Penalised(GRPO):
        @property
        def skips_zero_advantage(self) -> bool:
            return False

        def token_loss(self, tokens: TokenBatch) -> Any:
            loss, statistics = super().token_loss(tokens)
            return loss + (tokens.logprobs - tokens.sampling_logprobs).square(), statistics

    assert Module(tiny_model_path, objective=Penalised()).step([FLAT]).any()


def test_turns_of_one_sample_share_its_advantage(module: Module) -> None:
    """Two turns of one sample weigh as two samples with the same reward would, where advantages are equal."""
    one, other = make_group(7, (1, 0)).experiences
    more = make_group(8, (1, 0)).experiences
    several = [
        Experience("7", 0, (*one.turns, *more[0].turns), 1.0),
        Experience("7", 1, (*other.turns, *more[1].turns), 0.0),
    ]
    joined = Group(GroupKey(0, 0), "7", tuple(several))
    apart = [Group(GroupKey(0, 0), "7", (one, other)), Group(GroupKey(0, 1), "8", more)]
    assert close(module.step([joined]), module.step(apart))


# The model around it


def test_weights_hold_every_name_of_the_engine_aliases_included(module: Module) -> None:
    names = [name for name, _ in module.weights()]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(names)
    assert len(names) == len(set(names))


def test_dropout_is_off(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    module = Module(folder)
    assert module.policy is not None and module.policy.training
    assert torch.equal(module.step(GROUPS), module.step(GROUPS))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_policy_is_loaded_once(module: Module) -> None:
    policy = module.policy
    module.configure_model()
    assert module.policy is policy


def test_saved_folder_loads(module: Module, tmp_path: Path) -> None:
    module.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in module.weights():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert AutoTokenizer.from_pretrained(tmp_path)("1 + 1")["input_ids"]


def changed_model(model: Path, folder: Path, **files: dict[str, Any]) -> Path:
    """A copy of a model folder with other settings in its JSON files."""
    shutil.copytree(model, folder)
    for name, settings in files.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": False, "top_k": 20},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
        {"cache_implementation": "hybrid"},
        {"pad_token_id": -1},
    ],
    ids=str,
)
def test_a_generation_config_that_contradicts_itself_is_saved_as_it_was(
    settings: dict[str, Any], tiny_model_path: Path, tmp_path: Path
) -> None:
    module = Module(changed_model(tiny_model_path, tmp_path / "model", generation_config=settings))
    module.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: saved[name] for name in settings} == settings
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("1 + 1")["input_ids"]
    module.save_pretrained(tmp_path / "again")


def test_generation_settings_in_the_models_config_are_no_obstacle(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = changed_model(tiny_model_path, tmp_path / "model", config={"do_sample": False, "temperature": 0.6})
    (folder / "generation_config.json").unlink()
    Module(folder).save_pretrained(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("config", "told", "expected"),
    [
        ({"dtype": "bfloat16"}, None, torch.bfloat16),
        ({"dtype": None, "torch_dtype": "float16"}, None, torch.float16),
        ({"dtype": "bfloat16"}, torch.float32, torch.float32),
        ({"dtype": None}, None, torch.float32),
    ],
    ids=str,
)
def test_weights_are_saved_in_the_models_own_dtype(
    config: dict[str, Any], told: torch.dtype | None, expected: torch.dtype, tiny_model_path: Path, tmp_path: Path
) -> None:
    module = Module(changed_model(tiny_model_path, tmp_path / "model", config=config))
    module.save_pretrained(tmp_path / "saved", **{} if told is None else {"dtype": told})
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {expected}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.dtype == loaded.config.dtype == expected
    for name, tensor in module.weights():
        assert tensor.dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.to(expected))


def test_optimizer_and_scheduler_are_those_given(tiny_model_path: Path) -> None:
    module = Module(tiny_model_path)
    default = module.configure_optimizers()
    assert isinstance(default, torch.optim.AdamW)
    assert default.defaults["lr"] == 1e-6
    module = Module(
        tiny_model_path,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    )
    configured = module.configure_optimizers()
    assert isinstance(configured["optimizer"], torch.optim.SGD)
    assert isinstance(configured["lr_scheduler"]["scheduler"], torch.optim.lr_scheduler.StepLR)
    assert configured["lr_scheduler"]["interval"] == "step"


def test_model_folder_is_checked_by_name(tiny_model_path: Path, tmp_path: Path) -> None:
    Pretrained(str(tiny_model_path)).check()
    Pretrained("owner/name").check()  # perhaps on the hub
    for missing in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(ConfigurationError, match=r"is no folder"):
            RFTModule(missing)
    with pytest.raises(ConfigurationError, match=r"has no config.json"):
        RFTModule(tmp_path)
    shutil.copy(tiny_model_path / "config.json", tmp_path)
    with pytest.raises(ConfigurationError, match=r"has no tokenizer"):
        RFTModule(tmp_path)


def test_context_length_is_read_from_the_config(tiny_model_path: Path, tmp_path: Path) -> None:
    assert Pretrained(str(tiny_model_path)).context_length() == 512
    assert Pretrained("owner/name").context_length() is None
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"n_positions": 7}}))
    assert Pretrained(str(tmp_path)).context_length() == 7
