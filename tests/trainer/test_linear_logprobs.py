"""Log-probs of a linear head in chunks are those of a softmax over all logits, and so are their gradients."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lightning_rft.trainer import linear_logprobs as module
from lightning_rft.trainer.linear_logprobs import LogitTransform, chunk_tokens, linear_logprobs

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(seed, tokens=11, width=6, vocabulary=23):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=random)
    weight = torch.randn(vocabulary, width, generator=random)
    bias = torch.randn(vocabulary, generator=random)
    target = torch.randint(vocabulary, (tokens,), generator=random)
    upstream = torch.randn(tokens, generator=random)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target, upstream


def whole(hidden, weight, bias, target, temperature):
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature[:, None]
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(target), distribution.entropy()


@given(
    seed=st.integers(0, 99),
    tokens=st.integers(1, 30),
    chunk=st.integers(1, 31),
    warm=st.booleans(),
    with_bias=st.booleans(),
    masked=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_all_logits_at_once(seed, tokens, chunk, warm, with_bias, masked):
    hidden, weight, bias, target, upstream = numbers(seed, tokens)
    upstream = upstream * (torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) > masked)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    temperature = torch.linspace(0.5, 1.7, tokens) if warm else None
    expected = whole(hidden, weight, bias if with_bias else None, target, temperature if warm else torch.ones(tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_CHUNK", chunk)
        ours = linear_logprobs(hidden, weight, bias if with_bias else None, target, temperature=temperature)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
        for gradient, other in zip(
            torch.autograd.grad(ours[0], inputs, upstream),
            torch.autograd.grad(expected[0], inputs, upstream),
            strict=True,
        ):
            torch.testing.assert_close(gradient, other, atol=2e-5, rtol=1e-5)
    assert not ours[1].requires_grad


@given(
    seed=st.integers(0, 99),
    tokens=st.integers(1, 30),
    chunk=st.integers(1, 31),
    warm=st.booleans(),
    forbidden=st.booleans(),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    transform=st.builds(LogitTransform, st.sampled_from([1.0, 0.25, 3.0]), st.sampled_from([None, 2.0, 30.0])),
)
@settings(max_examples=100, deadline=None)
def test_gradient_is_that_of_all_logits_with_entropy_scale_and_cap(
    seed, tokens, chunk, warm, forbidden, share, transform
):
    """In float64 from autograd, for losses of log-probs and entropies in several proportions."""
    *inputs, target, upstream = numbers(seed, tokens)
    if forbidden:
        inputs[2].data[int(({*range(23)} - set(target.tolist())).pop())] = float("-inf")
    temperature = torch.linspace(0.5, 1.7, tokens) if warm else None

    def loss(logprobs, entropy):
        return ((1 - share) * upstream * logprobs).sum() + (share * upstream.flip(0) * entropy).sum() * (share > 0)

    doubled = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = transform.scale * torch.nn.functional.linear(*doubled)
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    logits = logits / (1 if temperature is None else temperature.double()[:, None])
    scores = logits.log_softmax(-1).clamp(min=-1e30)
    expected = scores.gather(-1, target[:, None])[:, 0], -(scores.exp() * scores).sum(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_CHUNK", chunk)
        ours = linear_logprobs(
            *inputs, target, temperature=temperature, transform=transform, entropy_gradient=share > 0
        )
        found = torch.autograd.grad(loss(*ours), inputs)
    torch.testing.assert_close(ours, tuple(value.float() for value in expected), atol=2e-5, rtol=0)
    for gradient, other in zip(found, torch.autograd.grad(loss(*expected), doubled), strict=True):
        torch.testing.assert_close(gradient, other.float(), atol=2e-4, rtol=1e-5)  # logits of up to 50


def test_frozen_head_gets_no_gradient():
    hidden, weight, _, target, _ = numbers(0)
    linear_logprobs(hidden, weight.detach(), None, target)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_backward_may_be_run_twice(monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", 4)
    hidden, weight, _, target, upstream = numbers(0)
    logprobs, _ = linear_logprobs(hidden, weight, None, target)
    once, again = (torch.autograd.grad(logprobs, (hidden, weight), upstream, retain_graph=True) for _ in "ab")
    torch.testing.assert_close(once, again)


def test_token_that_a_bias_forbids_has_no_nan():
    hidden, weight, bias, target, upstream = numbers(0)
    forbidden = int(({*range(23)} - set(target.tolist())).pop())
    with torch.no_grad():
        bias[forbidden] = float("-inf")
    logprobs, entropy = linear_logprobs(hidden, weight, bias, target, temperature=torch.full((11,), 0.7))
    expected, _ = whole(hidden, weight, bias, target, torch.full((11,), 0.7))
    torch.testing.assert_close(logprobs, expected, atol=2e-5, rtol=0)
    assert entropy.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(logprobs, (hidden, weight, bias), upstream))


@pytest.mark.parametrize("autocast", [True, False], ids=["fp32 weights under autocast", "bf16 weights"])
def test_half_precision_is_multiplied_in_half_and_summed_in_float32(autocast, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", 4)
    hidden, weight, _, target, upstream = numbers(0, tokens=40)
    expected = whole(hidden, weight, None, target, torch.ones(40))
    if not autocast:
        hidden, weight = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs, entropy = linear_logprobs(hidden, weight, None, target)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close((logprobs, entropy), expected, atol=0.1, rtol=0)
    ours = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    assert [gradient.dtype for gradient in ours] == [hidden.dtype, weight.dtype]
    hidden, weight, _, target, upstream = numbers(0, tokens=40)
    theirs = torch.autograd.grad(whole(hidden, weight, None, target, torch.ones(40))[0], (hidden, weight), upstream)
    for gradient, other in zip(ours, theirs, strict=True):
        assert (gradient.float() - other).norm() < 0.02 * other.norm()


def test_chunk_on_a_gpu_is_a_number_of_bytes():
    tokens = chunk_tokens(151_936, torch.device("cuda"))
    assert 0.99 * 2**30 < tokens * 151_936 * 4 <= 2**30
    assert chunk_tokens(2**40, torch.device("cuda")) == 1
    assert chunk_tokens(151_936, torch.device("cpu")) == 256


def test_no_tensor_is_as_large_as_all_logits(monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", 8)
    hidden, weight, _, target, upstream = numbers(0, tokens=80, vocabulary=64)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            largest.append(
                max((t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)), default=0)
            )
            return out

    with Sizes():
        logprobs, _ = linear_logprobs(hidden, weight, None, target)
        torch.autograd.grad(logprobs, (hidden, weight), upstream)
    assert max(largest) < 80 * 64 / 4
