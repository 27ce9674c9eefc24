"""Packed rows compute what the plain model computes on each text alone."""

import contextlib
import itertools
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from lightning_rft.experience import Turn
from lightning_rft.trainer import linear_logprobs as module
from lightning_rft.trainer.linear_logprobs import LogitTransform
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.packing import pack, shares_prompts
from tests.trainer.agents import agents

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=False),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
STATES = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
LINEAR = {f"linear_{size}": number for size, number in {
    "num_key_heads": 2, "num_value_heads": 2, "key_head_dim": 8, "value_head_dim": 8}.items()}  # fmt: skip
OTHERS = {
    "experts": Qwen3MoeConfig(**SIZES, **EXPERTS),
    "windows": Gemma3TextConfig(**SIZES, **SLIDING),
    "chunks": Llama4TextConfig(
        **SIZES, layer_types=["chunked_attention", "full_attention"], attention_chunk_size=4, num_local_experts=4,
        intermediate_size_mlp=64,
    ),
    "states": FalconH1Config(**SIZES, **STATES, mamba_chunk_size=8),
    "linear attention": Qwen3NextConfig(
        **SIZES, **EXPERTS, **LINEAR, layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=16,
    ),
    "alibi": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def build(config, attention="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the usual 0.02 gives attention so flat that a wrong mask would hardly show
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def turn(prompt, length):
    tokens = torch.randint(3, 97, (length,)).tolist()
    return Turn(prompt, tokens, (0.0,) * length, (0,) * length, "stop")


@pytest.fixture
def groups():
    torch.manual_seed(1)
    short, long, other = (tuple(torch.randint(3, 97, (n,)).tolist()) for n in (3, 9, 5))
    return [
        [turn(short, 6), turn(short, 1), turn(short, 11)],
        [turn(long, 4), turn(other, 7), turn(long, 2), turn(other, 1), turn((8,), 3)],
        [turn(short, 5)],
    ]


def warmed(groups):
    """The same turns, sampled at several temperatures."""
    temperatures = itertools.cycle((0.7, 1.0, 1.6))
    return [
        [Turn(one.prompt_ids, one.token_ids, one.logprobs, one.versions, "stop", next(temperatures)) for one in group]
        for group in groups
    ]


def plain(model, groups):
    """Each turn alone through the model: no padding, mask, positions or kept columns."""
    logprobs, entropy = [], []
    for group in groups:
        for one in group:
            logits = model(input_ids=torch.tensor([[*one.prompt_ids, *one.token_ids]])).logits[0]
            predicted = logits[len(one.prompt_ids) - 1 : -1].float() / one.temperature
            distribution = torch.distributions.Categorical(logits=predicted)
            logprobs.append(distribution.log_prob(torch.tensor(one.token_ids)))
            entropy.append(distribution.entropy())
    return torch.cat(logprobs), torch.cat(entropy)


def gradients(model, *results):
    model.zero_grad()
    weights = torch.linspace(-1, 1.5, len(results[0]))  # each token its own weight, so that order matters
    sum((weights * values).sum() for values in results).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    # Relative to the largest gradient: some are zero by symmetry (a key's bias), and noise has no relative precision.
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        scale = max(gradient.norm(), 1e-3 * largest)
        assert (ours[name] - gradient).norm() < tolerance * scale, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "ordinary"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_are_exact(name, shared, attention, groups):
    model = build(CONFIGS[name], attention)
    assert shares_prompts(model.config, attention)
    groups = warmed(groups)
    logprobs, entropy = token_logprobs(model, pack(groups, shared=shared))
    expected, expected_entropy = plain(model, groups)
    torch.testing.assert_close(logprobs, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=2e-5, rtol=0)
    assert_same_gradients(gradients(model, logprobs), gradients(model, expected))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "ordinary"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_trees_of_calls_are_exact(shared, seed):
    draw = random.Random(seed)
    trees = [agents(draw, ids=range(3, 9)) for _ in range(2)]
    groups = warmed([[call for call in tree if call.num_tokens] for tree in trees])
    assume(any(groups))
    model = build(CONFIGS["llama"])
    logprobs, entropy = token_logprobs(model, pack(groups, shared=shared, balance=1e9))
    expected, expected_entropy = plain(model, groups)
    torch.testing.assert_close(logprobs, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=2e-5, rtol=0)
    assert_same_gradients(gradients(model, logprobs), gradients(model, expected))


@pytest.mark.parametrize("name", OTHERS)
def test_ordinary_rows_need_no_mask(name, groups):
    """Not with windows or chunks, whose masks are the model's own, nor with states, convolutions or experts."""
    model, groups = build(OTHERS[name], None), warmed(groups)
    logprobs, _ = token_logprobs(model, pack(groups, shared=False))
    expected, _ = plain(model, groups)
    torch.testing.assert_close(logprobs, expected, atol=2e-5, rtol=0)
    assert_same_gradients(gradients(model, logprobs), gradients(model, expected), tolerance=1e-4)


def test_sliding_window_model_is_right_in_ordinary_rows_and_would_be_wrong_in_shared_ones(groups):
    model = build(MistralConfig(**SIZES, sliding_window=4))
    assert not shares_prompts(model.config, "sdpa")
    expected, _ = plain(model, groups)
    ordinary, _ = token_logprobs(model, pack(groups, shared=False))
    torch.testing.assert_close(ordinary, expected, atol=2e-5, rtol=0)
    shared, _ = token_logprobs(model, pack(groups, shared=True))
    assert (shared - expected).abs().max() > 1e-2


def test_results_are_float32_and_only_logprobs_have_a_gradient(groups):
    logprobs, entropy = token_logprobs(build(CONFIGS["llama"]), pack(groups, shared=True))
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.requires_grad and not entropy.requires_grad
    with torch.no_grad():
        assert not token_logprobs(build(CONFIGS["llama"]), pack(groups, shared=True))[0].requires_grad


@pytest.mark.parametrize("chunked_head", [LogitTransform(), None])
def test_entropy_has_a_gradient_where_it_is_wanted(chunked_head, groups):
    model, groups = build(CONFIGS["qwen2"]), warmed(groups)
    packed = pack(groups, shared=True)
    logprobs, entropy = token_logprobs(model, packed, chunked_head=chunked_head, entropy_gradient=True)
    expected = plain(model, groups)
    torch.testing.assert_close((logprobs, entropy), expected, atol=2e-5, rtol=0)
    found = gradients(model, logprobs, entropy)
    assert_same_gradients(found, gradients(model, *expected))
    alone, _ = token_logprobs(model, packed, chunked_head=chunked_head)
    assert (gradients(model, alone)["lm_head.weight"] - found["lm_head.weight"]).abs().max() > 1e-2


@pytest.mark.parametrize("entropy_gradient", [True, False])
def test_token_that_cannot_be_sampled_has_no_nan(entropy_gradient, groups):
    class Masked(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **kwargs):
            output = self.model(**kwargs)
            output.logits = output.logits.index_fill(-1, torch.tensor([0, 1]), float("-inf"))
            return output

    model = build(CONFIGS["llama"])
    logprobs, entropy = token_logprobs(Masked(model), pack(groups, shared=True), entropy_gradient=entropy_gradient)
    assert logprobs.isfinite().all() and entropy.isfinite().all()
    results = (logprobs, entropy) if entropy_gradient else (logprobs,)
    assert all(gradient.isfinite().all() for gradient in gradients(model, *results).values())


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "ordinary"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bf16_autocast_is_close(attention, shared, groups):
    model = build(CONFIGS["llama"], attention)
    expected, expected_entropy = plain(model, groups)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = token_logprobs(model, pack(groups, shared=shared))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, atol=0.15, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=0.15, rtol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(model, logprobs).values())


def test_mask_reaches_the_model_in_the_dtype_of_autocast(groups):
    model, seen = build(CONFIGS["llama"]), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context, torch.no_grad():
            token_logprobs(model, pack(groups, shared=True))
    assert [mask.dtype for mask in seen] == [torch.float32, torch.bfloat16]
    assert seen[1].isfinite().all()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        token_logprobs(model, pack(groups, shared=False))
    assert seen[2] is None


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_change_nothing(chunk, groups, monkeypatch):
    model, packed = build(CONFIGS["qwen2"]), pack(groups, shared=True)
    whole, whole_entropy = token_logprobs(model, packed)
    expected = gradients(model, whole)
    monkeypatch.setattr(module, "_CPU_CHUNK", chunk)
    logprobs, entropy = token_logprobs(model, packed)
    torch.testing.assert_close(logprobs, whole)
    torch.testing.assert_close(entropy, whole_entropy)
    assert_same_gradients(gradients(model, logprobs), expected)


def test_no_fp32_logits_are_kept_for_backward(groups):
    model, kept = build(CONFIGS["llama"]), []

    def note(tensor):
        if tensor.shape[-1] == SIZES["vocab_size"] and tensor.is_floating_point():
            kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        token_logprobs(model, pack(groups, shared=True))
    assert torch.float32 not in kept
