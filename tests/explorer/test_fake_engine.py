"""FakeEngine: content from the seed alone, speed from the setting alone."""

from __future__ import annotations

import hashlib
import math
import pickle
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from lightning_rft.errors import ConfigurationError, TransportError
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.sampling import Sampling


def started(max_model_len: int = 10_000, **settings: Any) -> FakeEngine:
    engine = FakeEngine(**settings)
    engine.start("anything", max_model_len=max_model_len, seed=0)
    return engine


def drain(engine: FakeEngine) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    while engine.has_work:
        done.update((completion.request_id, completion) for completion in engine.step())
    return done


def request(seed: int, max_new_tokens: int = 1000) -> Request:
    return Request(f"r{seed}", (1, 2), Sampling(max_new_tokens, 1.0, seed))


def test_content_depends_on_the_seed_alone() -> None:
    engine = started()
    for seed in range(20):
        engine.add(request(seed))
    together = drain(engine)
    for seed in range(20):
        alone = started()
        alone.add(request(seed))
        assert drain(alone) == {f"r{seed}": together[f"r{seed}"]}
    assert len({completion.token_ids for completion in together.values()}) == 20


def test_lengths_have_the_mean_and_finish_reasons_say_what_cut_them() -> None:
    engine = started(mean_tokens=8)
    for seed in range(4000):
        engine.add(request(seed))
    lengths = {name: len(completion.token_ids) for name, completion in drain(engine).items()}
    assert sum(lengths.values()) / 4000 == pytest.approx(8, rel=0.05)
    assert min(lengths.values()) == 1

    for seed in range(100):
        engine.add(request(seed, max_new_tokens=5))
    for name, completion in drain(engine).items():
        assert len(completion.token_ids) == min(lengths[name], 5)
        assert completion.finish_reason == ("stop" if lengths[name] < 5 else "length")
        assert completion.logprobs == (-math.log(64),) * len(completion.token_ids)
        assert all(0 <= token_id < 64 for token_id in completion.token_ids)


def test_speed_is_per_request() -> None:
    engine = started(tokens_per_second=25.0, mean_tokens=10_000)
    for seed in range(8):
        engine.add(request(seed, max_new_tokens=10))
    begin = time.monotonic()
    assert len(drain(engine)) == 8
    assert 0.4 <= time.monotonic() - begin < 2.0  # 3.2 s, were the requests served one after another


def test_load_keeps_digests_and_stamps_later_tokens(memory_link: Any) -> None:
    engine = started(mean_tokens=10_000)
    with pytest.raises(TransportError, match="connect"):
        engine.load([], 0)
    engine.connect(memory_link)
    engine.add(request(0, max_new_tokens=5))
    engine.step()
    weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    engine.load(memory_link.push({"w": weight.T, "scale": torch.tensor(2.0)}), 7)
    plain = weight.T.contiguous().view(torch.uint8).numpy().tobytes()
    assert engine.loaded["w"] == hashlib.blake2b(plain).hexdigest()
    assert set(engine.loaded) == {"w", "scale"}
    assert engine.version == 7
    assert drain(engine)["r0"].versions == (-1, 7, 7, 7, 7)


def test_a_missing_tensor_is_an_error_and_changes_nothing(memory_link: Any) -> None:
    engine = started()
    engine.connect(memory_link)
    engine.load(memory_link.push({"a": torch.zeros(1)}), 0)
    manifest = memory_link.push({"a": torch.ones(1), "b": torch.ones(1)})
    del memory_link.tensors["b"]
    before = dict(engine.loaded)
    with pytest.raises(TransportError, match="'b'"):
        engine.load(manifest, 1)
    assert (engine.version, engine.loaded) == (0, before)


def test_abort_connect_and_stop(memory_link: Any) -> None:
    engine = started()
    engine.add(request(0))
    engine.add(request(1))
    engine.abort(["r0", "unknown"])
    assert set(drain(engine)) == {"r1"}
    assert engine.step() == []
    engine.connect(memory_link)
    engine.connect(memory_link)
    assert (memory_link.opened, memory_link.closed) == ([0, 0], 1)
    engine.add(request(2))
    engine.stop()
    engine.stop()
    assert memory_link.closed == 2
    assert not engine.has_work


def test_prompt_logprobs_are_uniform() -> None:
    assert started(vocab_size=10).prompt_logprobs([1, 2, 3]) == [-math.log(10)] * 2


def test_too_long_is_refused_as_by_a_real_engine() -> None:
    with pytest.raises(ConfigurationError, match="max_new_tokens=9 make 11, more than max_model_len=10"):
        started(max_model_len=10).add(request(0, max_new_tokens=9))


@pytest.mark.parametrize(("setting", "value"), [("tokens_per_second", 0.0), ("mean_tokens", 0), ("vocab_size", 0)])
def test_check_names_the_setting(setting: str, value: float) -> None:
    engine = FakeEngine(**{setting: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=setting):
        engine.check()


def test_description_pickles() -> None:
    copy = pickle.loads(pickle.dumps(FakeEngine(tokens_per_second=3.0)))
    assert copy.tokens_per_second == 3.0


def test_import_and_sampling_need_no_torch() -> None:
    code = (
        "import sys; from lightning_rft.explorer.engines.fake import FakeEngine, Request\n"
        "from lightning_rft.sampling import Sampling\n"
        "engine = FakeEngine(); engine.start('', max_model_len=99, seed=0)\n"
        "engine.add(Request('r', (1,), Sampling(9, 1.0, 0)))\n"
        "while engine.has_work: engine.step()\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
