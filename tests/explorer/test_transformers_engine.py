"""TransformersEngine against plain forwards and ``generate`` of the same model."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_rft.errors import ConfigurationError, RFTError, TransportError
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.engines.transformers import TransformersEngine
from lightning_rft.sampling import Sampling
from lightning_rft.testing import tiny_model

PROMPTS: list[tuple[int, ...]] = [(7, 8, 9), (30,), (11, 50, 60, 12, 90, 33, 21, 17), (40, 41), (99, 98, 97, 96, 95)]


@contextmanager
def running(path: Path, max_model_len: int = 256, **settings: Any) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(dtype="float32", device="cpu", **settings)
    engine.start(str(path), max_model_len=max_model_len, seed=0)
    try:
        yield engine
    finally:
        engine.stop()


def drain(engine: TransformersEngine) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    while engine.has_work:
        done.update((completion.request_id, completion) for completion in engine.step())
    return done


def oracle(model: Any, prompt: Sequence[int], token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Log-probs of ``token_ids`` by one plain forward without cache, padding or mask."""
    ids = torch.tensor([[*prompt, *token_ids]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
    return logprobs[torch.arange(len(token_ids)), torch.tensor(token_ids)].tolist()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of each kind: "tied0", "tied1", "untied0", "untied1"."""
    root = tmp_path_factory.mktemp("pairs")
    return {
        f"{kind}{seed}": tiny_model(root / f"{kind}{seed}", seed=seed, tie_word_embeddings=kind == "tied")
        for kind in ("tied", "untied")
        for seed in (0, 1)
    }


@pytest.fixture(scope="module")
def models(paths: dict[str, Path]) -> dict[str, Any]:
    return {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in paths.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_greedy_equals_generate(tmp_path: Path, architecture: str) -> None:
    path = tiny_model(tmp_path, architecture=architecture, tie_word_embeddings=False)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    with running(path) as engine:
        for index, prompt in enumerate(PROMPTS):
            engine.add(Request(str(index), prompt, Sampling(24, 0.0, index)))
        done = drain(engine)
    for index, prompt in enumerate(PROMPTS):
        reference = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=24
        )
        assert list(done[str(index)].token_ids) == reference[0, len(prompt) :].tolist()
        expected = oracle(model, prompt, done[str(index)].token_ids)
        assert done[str(index)].logprobs == pytest.approx(expected, abs=1e-5)
    assert len({token for completion in done.values() for token in completion.token_ids}) > 5  # not degenerate


@pytest.mark.parametrize("kind", ["tied0", "untied0"])
def test_logprobs_equal_a_plain_forward(paths: dict[str, Path], models: dict[str, Any], kind: str) -> None:
    requests = [
        Request(f"{index}-{temperature}", prompt, Sampling(12 + 5 * index, temperature, index))
        for index, prompt in enumerate(PROMPTS)
        for temperature in (0.0, 0.7, 1.0, 1.5)
    ]
    with running(paths[kind]) as engine:
        for item in requests:
            engine.add(item)
        done = drain(engine)
    for item in requests:
        completion = done[item.id]
        expected = oracle(models[kind], item.prompt_ids, completion.token_ids, item.sampling.temperature)
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)
        assert completion.versions == (-1,) * len(completion.token_ids)


def test_learned_positions_see_no_padding(tmp_path: Path) -> None:
    # Rotary positions are relative: with those alone, positions that counted the padding would go unnoticed.
    torch.manual_seed(0)
    size = {"vocab_size": 128, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**size, initializer_range=0.2, bos_token_id=None, eos_token_id=1)  # type: ignore[arg-type]
    model: Any = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    with running(tmp_path) as engine:
        for index, prompt in enumerate(PROMPTS):
            engine.add(Request(str(index), prompt, Sampling(6 + index, 1.0, index)))
        done = drain(engine)
    for index, prompt in enumerate(PROMPTS):
        expected = oracle(model, prompt, done[str(index)].token_ids)
        assert done[str(index)].logprobs == pytest.approx(expected, abs=1e-5)


def test_sampled_tokens_have_the_models_distribution(paths: dict[str, Path], models: dict[str, Any]) -> None:
    draws, temperature = 4000, 0.8
    with running(paths["tied0"], max_batch_size=2000) as engine:
        for index in range(draws):
            engine.add(Request(str(index), PROMPTS[0], Sampling(1, temperature, index)))
        counts = Counter(completion.token_ids[0] for completion in drain(engine).values())
    with torch.no_grad():
        logits = models["tied0"](torch.tensor([PROMPTS[0]])).logits[0, -1]
    probs = torch.softmax(logits / temperature, -1).tolist()
    # Pearson's statistic has mean 127 and standard deviation 16 if the draws follow the distribution.
    chi2 = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in enumerate(probs))
    assert 127 - 5 * 16 < chi2 < 127 + 5 * 16


def test_content_is_independent_of_neighbours_and_of_joins(paths: dict[str, Path], models: dict[str, Any]) -> None:
    rng = random.Random(1)
    requests = [
        Request(str(index), rng.choice(PROMPTS), Sampling(rng.randint(1, 30), 1.0, 1000 + index)) for index in range(16)
    ]
    alone: dict[str, Completion] = {}
    with running(paths["tied0"]) as engine:
        for item in requests:
            engine.add(item)
            alone.update(drain(engine))
    together: dict[str, Completion] = {}
    waiting = list(requests)
    with running(paths["tied0"], max_batch_size=5) as engine:
        while waiting or engine.has_work:
            for _ in range(min(len(waiting), rng.randint(0, 2))):
                engine.add(waiting.pop(0))
            for completion in engine.step():
                assert completion.request_id not in together
                together[completion.request_id] = completion
    for item in requests:
        assert together[item.id].token_ids == alone[item.id].token_ids
        assert together[item.id].finish_reason == alone[item.id].finish_reason
        expected = oracle(models["tied0"], item.prompt_ids, together[item.id].token_ids)
        assert together[item.id].logprobs == pytest.approx(expected, abs=1e-5)
    assert len({completion.token_ids for completion in together.values()}) == 16


def test_seeds_that_differ_in_high_bits_only_are_different(paths: dict[str, Path]) -> None:
    with running(paths["tied0"]) as engine:
        for high in range(4):
            engine.add(Request(str(high), PROMPTS[0], Sampling(12, 1.0, 5 + (high << 32))))
        assert len({completion.token_ids for completion in drain(engine).values()}) == 4


def test_one_step_is_one_token_for_each_and_a_full_batch_queues(paths: dict[str, Path]) -> None:
    with running(paths["tied0"], max_batch_size=2) as engine:
        for index, length in enumerate([3, 1, 2]):
            engine.add(Request(str(index), PROMPTS[index], Sampling(length, 1.0, 4)))
        finished = [[(done.request_id, len(done.token_ids), done.finish_reason) for done in engine.step()]]
        while engine.has_work:
            finished.append([(done.request_id, len(done.token_ids), done.finish_reason) for done in engine.step()])
        assert engine.step() == []
    assert finished == [[("1", 1, "length")], [], [("0", 3, "length"), ("2", 2, "length")]]


@pytest.mark.parametrize("as_list", [False, True])
def test_eos_ends_a_completion_and_is_included(paths: dict[str, Path], tmp_path: Path, as_list: bool) -> None:
    with running(paths["untied0"]) as engine:
        engine.add(Request("a", PROMPTS[0], Sampling(20, 1.0, 3)))
        free = drain(engine)["a"]
    assert free.finish_reason == "length"
    eos = free.token_ids[7]
    model = AutoModelForCausalLM.from_pretrained(paths["untied0"])
    model.generation_config.eos_token_id = [1, eos] if as_list else eos
    model.save_pretrained(tmp_path)
    with running(tmp_path) as engine:
        engine.add(Request("a", PROMPTS[0], Sampling(20, 1.0, 3)))
        ended = drain(engine)["a"]
    length = free.token_ids.index(eos) + 1
    assert ended.token_ids == free.token_ids[:length]
    assert len(ended.logprobs) == len(ended.versions) == length
    assert ended.finish_reason == "stop"


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_load_in_mid_generation(paths: dict[str, Path], models: dict[str, Any], memory_link: Any, kind: str) -> None:
    old, new = models[f"{kind}0"], models[f"{kind}1"]
    with running(paths[f"{kind}1"]) as engine:
        engine.connect(memory_link)
        engine.load(memory_link.push(old.state_dict()), 4)
        for index, prompt in enumerate(PROMPTS):
            engine.add(Request(str(index), prompt, Sampling(10 + index, 1.0, 20 + index)))
        for _ in range(6):
            assert engine.step() == []
        engine.load(memory_link.push(new.state_dict()), 5)
        done = drain(engine)
    for index, prompt in enumerate(PROMPTS):
        completion = done[str(index)]
        length = len(completion.token_ids)
        assert length > 6
        assert completion.versions == (4,) * 6 + (5,) * (length - 6)
        by_old, by_new = (oracle(model, prompt, completion.token_ids) for model in (old, new))
        assert completion.logprobs == pytest.approx(by_old[:6] + by_new[6:], abs=1e-5)
        assert max(abs(a - b) for a, b in zip(by_old, by_new, strict=True)) > 0.1  # else this would prove nothing


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_after_a_load_it_is_a_fresh_engine(paths: dict[str, Path], memory_link: Any, kind: str) -> None:
    prompt = [random.Random(0).randrange(128) for _ in range(200)]
    with running(paths[f"{kind}1"]) as fresh:
        expected = fresh.prompt_logprobs(prompt)
        state = {name: tensor.clone() for name, tensor in fresh._lm.state_dict().items()}
    with running(paths[f"{kind}0"]) as engine:
        engine.connect(memory_link)
        before = engine.prompt_logprobs(prompt)
        engine.load(memory_link.push(state), 0)
        assert engine.prompt_logprobs(prompt) == expected
        assert all(torch.equal(tensor, state[name]) for name, tensor in engine._lm.state_dict().items())
    assert max(abs(a - b) for a, b in zip(before, expected, strict=True)) > 0.1


def test_prompt_logprobs_equal_a_plain_forward(paths: dict[str, Path], models: dict[str, Any]) -> None:
    prompt = PROMPTS[2]
    with running(paths["tied0"]) as engine:
        assert engine.prompt_logprobs(prompt) == pytest.approx(
            oracle(models["tied0"], prompt[:1], prompt[1:]), abs=1e-6
        )
        assert engine.prompt_logprobs([5]) == []


@pytest.mark.parametrize("fault", ["unknown", "shape", "missing", "alias", "not in manifest"])
def test_faulty_loads_name_the_weight(
    paths: dict[str, Path], models: dict[str, Any], memory_link: Any, fault: str
) -> None:
    good = models["tied1"].state_dict()
    bad, name = dict(good), "model.norm.weight"
    if fault == "unknown":
        name = "model.norm.wait"
        bad[name] = torch.ones(64)
    elif fault == "shape":
        bad[name] = torch.ones(1, 64)  # copy_ alone would broadcast it without a word
    elif fault == "missing":
        del bad[name]
    elif fault == "alias":
        name = "lm_head.weight"
        del bad[name]
    with running(paths["tied0"]) as engine:
        engine.connect(memory_link)
        engine.add(Request("a", PROMPTS[0], Sampling(5, 1.0, 0)))
        engine.step()
        manifest = memory_link.push(bad)
        if fault == "not in manifest":
            del memory_link.tensors[name]
        with pytest.raises(TransportError, match=name) as error:
            engine.load(manifest, 0)
        if fault != "shape":
            assert "model.embed_tokens.weight" in str(error.value)
        assert engine.version == -1
        # What is half old and half new must not sample under any version.
        for call in (engine.step, lambda: engine.prompt_logprobs([1, 2])):
            with pytest.raises(TransportError, match="half-way"):
                call()
        engine.load(memory_link.push(good), 1)
        completion = drain(engine)["a"]
        assert completion.versions == (-1, 1, 1, 1, 1)
        expected = oracle(models["tied1"], PROMPTS[0], completion.token_ids)
        assert completion.logprobs[1:] == pytest.approx(expected[1:], abs=1e-5)


def test_load_needs_a_connection_and_connect_replaces(paths: dict[str, Path], memory_link: Any) -> None:
    engine = TransformersEngine(device="cpu")
    engine.stop()
    engine.start(str(paths["tied0"]), max_model_len=64, seed=0)
    with pytest.raises(TransportError, match="connect"):
        engine.load([], 0)
    engine.connect(memory_link)
    engine.connect(memory_link)
    assert (memory_link.opened, memory_link.closed) == ([0, 0], 1)
    engine.add(Request("a", (7,), Sampling(3, 1.0, 0)))
    engine.stop()
    engine.stop()
    assert memory_link.closed == 2
    assert not engine.has_work
    with pytest.raises(RFTError, match="start"):
        engine.prompt_logprobs([1, 2])


def test_weights_that_are_not_finite_are_an_error(
    paths: dict[str, Path], models: dict[str, Any], memory_link: Any
) -> None:
    state = dict(models["tied0"].state_dict())
    state["model.norm.weight"] = torch.full((64,), math.nan)
    with running(paths["tied0"]) as engine:
        engine.connect(memory_link)
        engine.load(memory_link.push(state), 3)
        engine.add(Request("a", (7,), Sampling(3, 1.0, 0)))
        with pytest.raises(RFTError, match="version 3"):
            engine.step()


def test_abort_queued_and_running(paths: dict[str, Path], models: dict[str, Any]) -> None:
    with running(paths["tied0"], max_batch_size=3) as engine:
        for index in range(5):
            engine.add(Request(str(index), PROMPTS[index], Sampling(10, 1.0, index)))
        engine.step()
        engine.step()
        engine.abort(["1", "3", "unknown"])
        done = drain(engine)
    assert set(done) == {"0", "2", "4"}
    for name, completion in done.items():
        expected = oracle(models["tied0"], PROMPTS[int(name)], completion.token_ids)
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request("a", (1, 2, 3), Sampling(8, 1.0)),
            "3 tokens and max_new_tokens=8 make 11, more than max_model_len=10",
        ),
        (Request("a", (), Sampling(8, 1.0)), "needs a prompt"),
        (Request("a", (1,), Sampling(temperature=1.0)), "needs .* max_new_tokens"),
        (Request("a", (1,), Sampling(1)), "needs .* temperature"),
    ],
)
def test_requests_that_cannot_run_are_refused(paths: dict[str, Path], request_: Request, message: str) -> None:
    with running(paths["tied0"], max_model_len=10) as engine:
        engine.add(Request("fits", (1, 2, 3), Sampling(7, 1.0)))
        with pytest.raises(ConfigurationError, match=message):
            engine.add(request_)
        assert set(drain(engine)) == {"fits"}


@pytest.mark.parametrize(("setting", "value"), [("dtype", "float8"), ("max_batch_size", 0)])
def test_check_names_the_setting(setting: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=setting):
        TransformersEngine(**{setting: value}).check()


def test_own_model_goes_first_and_bfloat16_samples(paths: dict[str, Path]) -> None:
    engine = pickle.loads(pickle.dumps(TransformersEngine(model=str(paths["untied0"]), dtype="bfloat16", device="cpu")))
    engine.start("/no/such/model", max_model_len=64, seed=0)
    engine.add(Request("a", PROMPTS[0], Sampling(5, 1.0, 0)))
    assert len(drain(engine)["a"].token_ids) == 5
    assert {tensor.dtype for tensor in engine._lm.state_dict().values()} == {torch.bfloat16}
    engine.stop()
