"""The probe finds out which models may take which shortcut, and training is right either way."""

import logging

import pytest
import torch
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaForCausalLM, MistralConfig, Qwen2Config

from lightning_rft.trainer import shortcuts as module
from lightning_rft.trainer.linear_logprobs import LogitTransform
from lightning_rft.trainer.lines import find_lines
from lightning_rft.trainer.logprobs import kept_logits, replaced_forward, token_logprobs
from lightning_rft.trainer.packing import pack
from lightning_rft.trainer.shortcuts import probe
from tests.trainer.test_logprobs import CONFIGS, SIZES, assert_same_gradients, build, gradients, plain, turn, warmed

pytestmark = pytest.mark.usefixtures("one_thread")

GEMMA2 = {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 64}
EXACT_HEADS = {
    **CONFIGS,
    "tied llama": type(CONFIGS["llama"])(**SIZES, tie_word_embeddings=True),
    "window": MistralConfig(**SIZES, sliding_window=4),
    "gemma2 without softcapping": Gemma2Config(**GEMMA2, final_logit_softcapping=None),
}
TRANSFORMED_HEADS = {
    "softcapping": (Gemma2Config(**GEMMA2, final_logit_softcapping=30.0), LogitTransform(cap=30.0)),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.3, pad_token_id=0), LogitTransform(scale=0.3)),
    "granite": (GraniteConfig(**SIZES, logits_scaling=3.0), LogitTransform(scale=1 / 3.0)),
}


class Shifted(LlamaForCausalLM):
    """Its logits are more than a head's, scaled or capped."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = output.logits + torch.linspace(-1, 1, output.logits.shape[-1])
        return output


@pytest.fixture
def groups():
    torch.manual_seed(1)
    short, long, other = (tuple(torch.randint(3, 97, (n,)).tolist()) for n in (3, 9, 5))
    return [
        [turn(short, 6), turn(short, 1), turn(short, 11)],
        [turn(long, 4), turn(other, 7), turn(long, 2), turn(other, 1), turn((8,), 3)],
        [turn(short, 5)],
    ]


def shifted():
    model = build(CONFIGS["llama"])
    model.__class__ = Shifted
    return model


def check(model, path, groups):
    """Whatever was chosen: log-probs, entropy and gradient are those of each text alone."""
    groups = warmed(groups)
    logprobs, entropy = token_logprobs(model, path.pack(groups), chunked_head=path.chunked_head)
    expected, expected_entropy = plain(model, groups)
    torch.testing.assert_close(logprobs, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=2e-5, rtol=0)
    assert_same_gradients(gradients(model, logprobs), gradients(model, expected))


@pytest.mark.parametrize("name", EXACT_HEADS)
def test_log_probs_inside_the_head_are_exact(name, groups):
    model = build(EXACT_HEADS[name])
    path = probe(model, groups, attn_implementation="sdpa")
    assert path.chunked_head == LogitTransform()
    assert path.shared == (name in CONFIGS or name == "tied llama")
    check(model, path, groups)
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMED_HEADS)
def test_scale_and_cap_of_the_logits_are_found(name, dtype, groups, caplog):
    config, transform = TRANSFORMED_HEADS[name]
    model = build(config).to(dtype)
    with caplog.at_level(logging.INFO):
        path = probe(model, groups, attn_implementation="sdpa")
    assert path.chunked_head == transform
    assert not caplog.records
    if dtype == torch.float32:
        check(model, path, groups)


def test_logits_that_are_more_than_the_head_s_are_computed_plainly(groups, caplog):
    model = shifted()
    with caplog.at_level(logging.INFO):
        path = probe(model, groups, attn_implementation="sdpa")
    assert path.chunked_head is None
    assert "scaled or capped by a number" in caplog.text
    check(model, path, groups)


def test_head_of_another_kind_is_computed_plainly(groups, caplog):
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = build(CONFIGS["llama"])
    head = model.get_output_embeddings()
    model.set_output_embeddings(Doubled(head.in_features, head.out_features, bias=False))
    with caplog.at_level(logging.INFO):
        path = probe(model, groups, attn_implementation="sdpa")
    assert not path.chunked_head and path.shared
    assert "not a plain linear layer" in caplog.text
    check(model, path, groups)


def test_shared_rows_that_differ_are_given_up(groups, monkeypatch, caplog):
    monkeypatch.setattr(module, "shares_prompts", lambda *_: True)
    model = build(MistralConfig(**SIZES, sliding_window=12))
    with caplog.at_level(logging.INFO):
        path = probe(model, groups, attn_implementation="sdpa")
    assert path.chunked_head and not path.shared
    assert "rows of their own" in caplog.text
    check(model, path, groups)


def test_nothing_is_said_where_all_is_well(groups, caplog):
    with caplog.at_level(logging.INFO):
        probe(build(CONFIGS["llama"]), groups, attn_implementation="sdpa")
    assert not caplog.records


@pytest.mark.parametrize("make", [lambda: build(CONFIGS["qwen2"]), shifted], ids=["fast", "plain"])
def test_ranks_run_as_many_forwards_whatever_their_share_is(make, groups):
    counts = []
    for turns in ([], [[]], groups, [[turn(range(3, 50), 40)] * 3]):
        model, calls = make(), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        probe(model, turns, attn_implementation="sdpa")
        counts.append(len(calls))
    assert len(set(counts)) == 1


def test_made_up_row_is_as_long_as_real_ones(groups):
    model, widths = build(CONFIGS["llama"]), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    probe(model, [[turn(range(3, 43), 20) for _ in range(3)]], attn_implementation="sdpa")
    assert (1, 40 + 3 * 19 - 1) in widths  # two of those that are made up begin with the same token


def test_first_step_under_autocast_has_a_gradient(groups):
    """Autocast would reuse the weights that it cast for the probe, which have none."""
    model = build(Qwen2Config(**SIZES, use_sliding_window=False))
    with torch.autocast("cpu", torch.bfloat16):
        path = probe(model, groups, attn_implementation="sdpa")
        logprobs, _ = token_logprobs(model, path.pack(groups), chunked_head=path.chunked_head)
    found = gradients(model, logprobs)
    assert path.chunked_head and path.shared
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("name", ["llama", "window"])
def test_columns_are_those_of_the_rows(name, groups):
    path = probe(build(EXACT_HEADS[name]), groups, attn_implementation="sdpa")
    for turns in (groups, groups[:1], groups[1:], [[]]):
        assert path.columns(find_lines(turns)) == (path.pack(turns).input_ids.numel() if any(turns) else 0)


def test_mask_has_the_dtype_of_the_queries():
    with torch.autocast("cpu", torch.bfloat16):
        assert probe(build(CONFIGS["llama"]), [], attn_implementation="sdpa").mask_dtype == torch.bfloat16
    assert probe(build(CONFIGS["llama"]), [], attn_implementation="sdpa").mask_dtype == torch.float32
    assert probe(build(CONFIGS["llama"]).bfloat16(), [], attn_implementation="sdpa").mask_dtype == torch.bfloat16


def test_head_is_restored_when_the_model_raises(groups):
    model = build(CONFIGS["llama"])
    head = model.get_output_embeddings()

    def fail(hidden):
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"), replaced_forward(head, fail):
        kept_logits(model, pack(groups, shared=False))
    hidden = torch.zeros(1, SIZES["hidden_size"])
    with replaced_forward(head, lambda _: "outer"):
        with replaced_forward(head, lambda _: "inner"):
            assert head(hidden) == "inner"
        assert head(hidden) == "outer"
    assert "forward" not in vars(head)
    assert head(hidden).shape == (1, SIZES["vocab_size"])


def test_replaced_forward_keeps_its_hooks(groups):
    model, seen = build(CONFIGS["llama"]), []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda *_: seen.append("before"))
    head.register_forward_hook(lambda *_: seen.append("after"))
    token_logprobs(model, pack(groups, shared=True), chunked_head=LogitTransform())
    assert seen == ["before", "after"]
