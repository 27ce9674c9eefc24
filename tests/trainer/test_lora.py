"""LoRA: what is merged is what peft merges, the base stays as it is, and what cannot be merged is refused."""

from __future__ import annotations

import copy
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import lightning_rft as rft
from lightning_rft.errors import AgreementError, ConfigurationError
from lightning_rft.explorer.engines.transformers import TransformersEngine
from lightning_rft.model_folder import Pretrained, checkpoint_weights
from lightning_rft.run.agreement import Agreement, is_base
from lightning_rft.testing import tiny_model
from lightning_rft.trainer.gathering import Gathering
from lightning_rft.trainer.loading import check_adapter, load_policy
from lightning_rft.trainer.lora import Base, adapter_settings, merged, switched_off
from lightning_rft.trainer.precision import MasterWeights, optimizer_for
from lightning_rft.trainer.scoring import encoded_text, score
from tests.explorer.links import MemoryLink
from tests.explorer.test_models import write
from tests.trainer.test_module import GROUPS
from tests.training_step import SteppedModule

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

ALL = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


def fill(policy: Any, size: float = 0.05, seed: int = 0) -> None:
    """Gives an adapter that is new, and therefore zero, random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def adapted_policy(model: Path, **config: Any) -> Any:
    policy = load_policy(Pretrained(str(model)), None, adapter=adapter_settings(ALL | config))
    fill(policy)
    return policy


def base_of(policy: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}


# What is merged


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("untied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("untied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("qwen2", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),  # with biases
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),  # whose experts are one tensor in memory
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_what_is_pushed_and_saved_is_what_peft_merges(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if kind == "untied":
        tiny_model(folder, tie_word_embeddings=False)
    else:
        folder.mkdir()
        write(kind, folder, 0)
    module = rft.RFTModule(folder, peft_config=peft.LoraConfig(**ALL | config))
    module.configure_model()
    fill(module.policy)
    before = base_of(module.policy)

    module.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = checkpoint_weights(base, base.state_dict()).keys()
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
    expected = checkpoint_weights(theirs, theirs.state_dict())

    gathering = Gathering(module.policy)
    found = dict(module.weights())
    assert found.keys() == names
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-6), name
    untouched = checkpoint_weights(base, base.state_dict())
    changed = {name for name in names if not torch.equal(found[name], untouched[name])}
    assert changed == gathering.trained & changed and changed
    assert {info.name: info.same_as for info in gathering.manifest()} == {
        info.name: info.same_as for info in Gathering(base).manifest()
    }

    module.save_pretrained(tmp_path / "merged", merged=True)
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, tensor in checkpoint_weights(whole, whole.state_dict()).items():
        assert torch.equal(tensor, found[name]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_of(module.policy).items())


def test_the_saved_adapter_names_its_base_model(tiny_model_path: Path, tmp_path: Path) -> None:
    module = rft.RFTModule(tiny_model_path, peft_config=ALL)
    module.configure_model()
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (str(tiny_model_path), 4)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(module.policy(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits)  # type: ignore[misc]


def test_sums_are_formed_in_float32_whatever_the_model_is_in(tiny_model_path: Path) -> None:
    policy = adapted_policy(tiny_model_path).bfloat16()
    layer = policy.model.layers[0].self_attn.q_proj
    weight, up, down = (t.weight.double() for t in (layer.base_layer, layer.lora_B.default, layer.lora_A.default))
    assert torch.allclose(merged(layer, torch.float32).double(), weight + up @ down * 4, rtol=1e-6, atol=1e-7)
    arrived = dict(Gathering(policy).tensors(None))["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(arrived, merged(layer, torch.float32).bfloat16())


# What is trained


def test_the_adapter_alone_is_trained(tiny_model_path: Path) -> None:
    module = SteppedModule(tiny_model_path, peft_config=ALL)
    before = base_of(module.policy)
    optimizer = optimizer_for(module.parameters(), lambda p: torch.optim.SGD(p, lr=1.0), sharded=False)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name for name in trained)
    assert len(trained) == len(optimizer.param_groups[0]["params"]) == 2 * 2 * 7
    module.step(GROUPS)
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_of(module.policy).items())
    assert any(bool(module.get_parameter(name).any()) for name in trained if "lora_B" in name)


def gradients(module: Any, **settings: Any) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module.step(GROUPS, **settings)
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "lm_head"]])
def test_every_way_to_compute_a_step_gives_the_gradient_of_the_merged_weight(target: Any, tmp_path: Path) -> None:
    """By the chain rule from a whole model's gradient; ``lm_head`` is one that no chunks are made of."""
    folder = tiny_model(tmp_path / "model", tie_word_embeddings=False)
    module = SteppedModule(folder, peft_config=ALL | {"target_modules": target}, attn_implementation="sdpa")
    fill(module.policy)
    module.save_pretrained(tmp_path / "merged", merged=True, dtype=torch.float32)
    plain = SteppedModule(tmp_path / "merged", attn_implementation="sdpa")
    plain.step(GROUPS)
    expected = {}
    for name, layer in module.policy.named_modules():
        if hasattr(layer, "lora_A"):
            gradient = plain.policy.get_parameter(f"{name}.weight").grad * layer.scaling["default"]
            expected[f"policy.{name}.lora_A.default.weight"] = layer.lora_B.default.weight.T @ gradient
            expected[f"policy.{name}.lora_B.default.weight"] = gradient @ layer.lora_A.default.weight.T
    ways: list[tuple[bool, dict[str, Any]]] = [(False, {}), (False, {"max_tokens": 30}), (True, {})]
    for checkpointing, way in ways:
        if checkpointing:
            module.policy.gradient_checkpointing_enable({"use_reentrant": False})
        found = gradients(module, **way)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), (way, name)
    assert module.fast_path.shared
    assert (module.fast_path.chunked_head is None) == ("lm_head" in target)


def test_small_steps_in_half_precision_are_kept(tiny_model_path: Path) -> None:
    policy = adapted_policy(tiny_model_path).bfloat16()
    optimizer = optimizer_for(policy.parameters(), lambda p: torch.optim.SGD(p, lr=1e-3), sharded=False)
    assert isinstance(optimizer, MasterWeights)
    assert len(optimizer.param_groups[0]["params"]) == 2 * 2 * 7
    before = copy.deepcopy(policy.state_dict())
    for _ in range(4):
        for parameter in policy.parameters():
            parameter.grad = torch.full_like(parameter, 1e-2) if parameter.requires_grad else None
        optimizer.step()
    for (name, tensor), (_, master) in zip(
        ((n, p) for n, p in policy.named_parameters() if p.requires_grad), optimizer._copied(), strict=True
    ):
        assert torch.allclose(before[name].float() - master, torch.tensor(4e-5), atol=1e-6)
        assert torch.equal(tensor, master.bfloat16())


def test_the_reference_is_the_model_with_its_adapter_off(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", tie_word_embeddings=False)
    policy = adapted_policy(folder, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    plain = load_policy(Pretrained(str(folder)), None)
    ids = torch.arange(5, 40)[None]
    reference = Base(policy)
    assert torch.equal(reference(ids).logits, plain(ids).logits)
    assert not torch.allclose(policy(ids).logits, plain(ids).logits, atol=0.1)
    assert reference.device == policy.device
    with pytest.raises(KeyError), switched_off(policy):
        raise KeyError
    assert not torch.equal(policy(ids).logits, plain(ids).logits)
    assert any(parameter.requires_grad for parameter in policy.parameters())


# What is saved


def test_the_modules_state_is_the_adapter(tiny_model_path: Path) -> None:
    module, other = (rft.RFTModule(tiny_model_path, peft_config=ALL) for _ in range(2))
    module.configure_model()
    fill(module.policy)
    state = module.state_dict()
    assert len(state) == 2 * 2 * 7 and all(".lora_" in name for name in state)
    other.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    first = next(iter(state))
    for wrong in (
        {name: t for name, t in state.items() if name != first},
        {**state, "policy.lm_head.bias": state[first]},
    ):
        with pytest.raises(RuntimeError, match="Missing key" if len(wrong) < len(state) else "Unexpected key"):
            other.load_state_dict(wrong)


def test_hyperparameters_are_plain(tiny_model_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules={"v_proj", "q_proj"}, rank_pattern={"q_proj": 3}, task_type="CAUSAL_LM"
    )
    module = rft.RFTModule(tiny_model_path, peft_config=config)
    file = io.BytesIO()
    torch.save(dict(module.hparams), file)
    file.seek(0)
    again = rft.RFTModule(**torch.load(file, weights_only=True))
    assert again.peft_config == module.peft_config
    assert again.peft_config == {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}}


# What is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "type PromptTuningConfig"),
        (lambda: peft.IA3Config(), "type IA3Config"),
        (lambda: [peft.LoraConfig(), peft.LoraConfig()], "type list: give one"),
        (lambda: {"one": {"r": 4}, "two": {"r": 4}}, "no set of settings of peft.LoraConfig: .*'one'"),
        (lambda: {"class_path": "peft.IA3Config", "init_args": {}}, "type IA3Config"),
        (lambda: peft.LoraConfig(use_dora=True), "use_dora=True.*: leave it out"),
        (lambda: peft.LoraConfig(bias="all"), "bias='all'.*: leave it out"),
        (lambda: peft.LoraConfig(lora_bias=True), "lora_bias=True"),
        (lambda: peft.LoraConfig(target_parameters=["experts.gate_up_proj"]), "target_parameters="),
        (lambda: peft.LoraConfig(trainable_token_indices=[1]), "trainable_token_indices="),
        (lambda: peft.LoraConfig(lora_dropout=0.1), "lora_dropout=0.1.*: leave it at 0"),
        (lambda: peft.LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa'.*changes the base model"),
    ],
)
def test_what_cannot_be_merged_is_refused(config: Any, message: str, tiny_model_path: Path) -> None:
    given = config()
    with pytest.raises(ConfigurationError, match=message):
        rft.RFTModule(tiny_model_path, peft_config=given)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "`r` should be a positive integer"),
        ({"target_modules": ["query"]}, "does not fit this model: .*query"),
        ({"target_modules": ["embed_tokens"]}, "trains (model.embed_tokens|lm_head).weight, which is one tensor with"),
        ({"modules_to_save": ["lm_head"]}, "trains lm_head.weight, which is one tensor with"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_what_does_not_fit_the_model_is_refused_before_it_is_loaded(
    config: dict[str, Any], message: str, tiny_model_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_adapter(Pretrained(str(tiny_model_path)), adapter_settings(ALL | config))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_experts_that_are_one_tensor_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = write("mixtral", tmp_path / "model", 0)
    with pytest.raises(ConfigurationError, match="cannot be merged: name only linear layers and embeddings"):
        check_adapter(Pretrained(str(folder)), adapter_settings(ALL | {"target_modules": ["q_proj", "w1", "w2", "w3"]}))


def test_a_quantised_model_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="is quantised"):
        check_adapter(Pretrained(str(folder)), adapter_settings(ALL))


def test_a_missing_peft_is_named(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    rft.RFTModule(tiny_model_path).configure_model()
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning-rft\[lora\]'"):
        rft.RFTModule(tiny_model_path, peft_config={"r": 4})


# Whether a push arrived


@settings(deadline=None)
@given(
    st.integers(20, 64),
    st.floats(-9, 1).map(lambda power: 10**power),
    st.floats(-9, 1).map(lambda power: 10**power),
    st.integers(0, 2**32).map(random.Random),
)
def test_an_adapter_that_arrived_is_never_taken_for_the_base(
    tokens: int, effect: float, noise: float, draw: random.Random
) -> None:
    base = [-draw.expovariate(0.3) for _ in range(tokens)]
    pushed = [value + draw.gauss(0, effect) for value in base]
    scored = [value + draw.gauss(0, noise) for value in pushed]
    assert not is_base(pushed, pushed, base)
    assert not is_base(scored, pushed, base)
    if effect > 10 * max(noise, 1e-6):
        assert is_base([value + draw.gauss(0, noise) for value in base], pushed, base)
    assert not is_base(scored, base, base)


def test_the_text_is_scored_with_the_weights_as_they_are_pushed(tiny_model_path: Path) -> None:
    """In the engine's dtype a small adapter vanishes: only what is left of it can show that a push arrived."""
    policy = adapted_policy(tiny_model_path)
    fill(policy, 0.01)
    ids, cpu = encoded_text(Pretrained(str(tiny_model_path))), torch.device("cpu")
    scores = score(policy, ids, cpu, "bfloat16")
    assert scores.pushed_and_base is not None
    arrived = dict(Gathering(policy).tensors("bfloat16"))
    plain, base = (load_policy(Pretrained(str(tiny_model_path)), None) for _ in range(2))
    for found, whole in zip(scores.pushed_and_base, (arrived, base.state_dict()), strict=True):
        for name in Gathering(policy).trained:
            plain.get_parameter(name).data.copy_(whole[name].bfloat16())
        assert found == pytest.approx(score(plain, ids, cpu).logprobs, abs=1e-5)
    assert scores.logprobs != pytest.approx(scores.pushed_and_base[0], abs=1e-4)


class Pair:
    """A policy with an adapter, computing in a dtype by autocast, and an engine that computes in it."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = dtype
        self.policy = load_policy(Pretrained(str(path)), None, adapter=adapter_settings(ALL))
        self.ids = encoded_text(Pretrained(str(path)))
        self.engine = TransformersEngine(dtype=dtype, device="cpu")
        self.engine.start(str(path), max_model_len=200, seed=0)
        self.link = MemoryLink()
        self.engine.connect(self.link)
        self.agreement = Agreement(None, lambda: dtype)
        self.base = {name: tensor.clone() for name, tensor in self.weights().items()}

    def weights(self) -> dict[str, torch.Tensor]:
        tensors = dict(Gathering(self.policy).tensors(self.dtype))
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        return {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in tensors.items()}

    def load(self, version: int, arrives: bool) -> None:
        self.engine.load(self.link.push(self.weights() if arrives else self.base), version)

    def push(self, version: int, arrives: bool = True) -> float:
        with torch.autocast("cpu", getattr(torch, self.dtype), enabled=self.dtype != "float32"):
            self.agreement.expect(version, score(self.policy, self.ids, torch.device("cpu"), self.dtype))
        self.load(version, arrives)
        self.agreement.scored(0, version, self.engine.prompt_logprobs(self.ids))
        return self.agreement.metrics()["rft/push_gap"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_does_not_arrive_is_an_error_as_soon_as_it_shows(dtype: str, tiny_model_path: Path) -> None:
    """From a zero adapter, and one that vanishes in the engine's dtype, to one that is all there is."""
    pair = Pair(tiny_model_path, dtype)
    try:
        pair.push(0)
        pair.push(0, arrives=False)  # it is the base
        doubtful = []
        for number, size in enumerate((1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3), 1):
            fill(pair.policy, size, seed=number)
            pair.push(number)  # never an error
            pair.load(number, arrives=False)
            scores = pair.agreement._expected[number]
            if not is_base(pair.engine.prompt_logprobs(pair.ids), *scores.pushed_and_base):
                doubtful.append(size)
        assert all(size <= (1e-4 if dtype == "float32" else 3e-2) for size in doubtful), doubtful
        with pytest.raises(AgreementError, match="after the push of version 9: the weights did not arrive"):
            pair.push(9, arrives=False)
    finally:
        pair.engine.stop()
