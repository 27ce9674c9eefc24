"""Engines that sleep: what they refuse meanwhile, and that they sample again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_rft as rft
from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.explorer.engines.requests import Request
from lightning_rft.explorer.engines.sleeping import DROPS, KEEPS, WEIGHTS
from lightning_rft.settings import Sampling
from tests.explorer.links import MemoryLink

pytestmark = pytest.mark.usefixtures("one_thread")


def request() -> Request:
    return Request("a", (3, 4, 5), Sampling(max_new_tokens=4, temperature=1.0, seed=5))


def sampled(engine: rft.Engine) -> Any:
    engine.add(request())
    while not (done := engine.step()):
        pass
    return done[0].token_ids, done[0].logprobs, done[0].versions


class Freeing(rft.TransformersEngine):
    """Gives the CPU's memory back, as it does a GPU's."""

    _frees = ("cpu",)

    def start(self, model: Any, *, max_model_len: int, seed: int) -> None:
        super().start(model, max_model_len=max_model_len, seed=seed)
        for parameter in self._lm.parameters():
            parameter.data = parameter.data.clone()  # what was read is the file's memory


def held(engine: rft.TransformersEngine) -> list[int]:
    """Bytes of memory of each weight."""
    return [parameter.untyped_storage().nbytes() for parameter in engine._lm.parameters()]


class Link(MemoryLink):
    """Pushes the same weights again and again."""

    def __init__(self, engine: rft.Engine) -> None:
        super().__init__()
        self.weights = {"weight": torch.ones(3)}
        if isinstance(engine, rft.TransformersEngine):
            self.weights = {name: tensor.clone() for name, tensor in engine._lm.state_dict().items()}

    def pushed(self) -> Any:
        return self.push(self.weights)


def started(engine: rft.Engine, model: Path) -> Iterator[tuple[Any, Link]]:
    engine.start(str(model), max_model_len=16, seed=0)
    link = Link(engine)
    engine.connect(link)
    engine.load(link.pushed(), 3)
    yield engine, link
    engine.stop()


@pytest.fixture(params=[rft.FakeEngine, rft.TransformersEngine, Freeing])
def engine(request: pytest.FixtureRequest, tiny_model_path: Path) -> Any:
    yield from started(request.param(), tiny_model_path)


@pytest.fixture
def freeing(tiny_model_path: Path) -> Any:
    yield from started(Freeing(), tiny_model_path)


def refuses(engine: rft.Engine, link: Link, *, loads: bool = False) -> None:
    """What sleeps is neither asked to sample nor to score, and loads only if its weights are awake."""
    with pytest.raises(ScheduleError, match="add a request"):
        engine.add(request())
    with pytest.raises(ScheduleError, match="step"):
        engine.step()
    with pytest.raises(ScheduleError, match="score"):
        engine.prompt_logprobs((3, 4, 5))
    if not loads:
        with pytest.raises(ScheduleError, match="load while its weights"):
            engine.load(link.pushed(), 4)


def test_one_that_kept_its_weights_samples_as_before(engine: Any) -> None:
    engine, link = engine
    before = sampled(engine)
    engine.sleep(KEEPS)
    refuses(engine, link)
    assert engine.wake() == ["weights", "kv_cache"] and engine.wake() == []
    assert sampled(engine) == before and engine.version == 3


def test_one_that_dropped_its_weights_loads_before_it_samples(engine: Any) -> None:
    engine, link = engine
    tokens, logprobs, _ = sampled(engine)
    engine.sleep(DROPS)
    refuses(engine, link)
    assert engine.wake(WEIGHTS) == ["weights"]
    refuses(engine, link, loads=True)
    assert engine.wake() == ["kv_cache"]
    with pytest.raises(ScheduleError, match="add a request without weights"):  # awake, but what with?
        engine.add(request())
    engine.load(link.pushed(), 4)
    assert sampled(engine) == (tokens, logprobs, (4,) * len(tokens))


def test_what_is_busy_or_sleeps_is_not_put_to_sleep(engine: Any) -> None:
    engine, _ = engine
    engine.add(request())
    with pytest.raises(ScheduleError, match="has work"):
        engine.sleep(KEEPS)
    engine.abort(["a"])
    with pytest.raises(ScheduleError, match="level=3"):
        engine.sleep(3)
    engine.sleep(KEEPS)
    with pytest.raises(ScheduleError, match="while it sleeps"):
        engine.sleep(DROPS)
    with pytest.raises(ScheduleError, match="no cache to wake"):
        engine.wake(("cache",))


@pytest.mark.parametrize("level", [KEEPS, DROPS])
def test_weights_and_caches_take_no_memory_of_a_device_asleep(
    freeing: Any, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, link = freeing
    emptied: list[list[int]] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held(engine)))
    before, tokens = held(engine), sampled(engine)[0]
    engine.sleep(level)
    assert (engine._cache, engine._mask, engine._rows) == (None, None, [])
    assert min(before) > 0 and held(engine) == [0] * len(before)
    assert emptied == [held(engine)]  # after the weights have gone, or their memory stays reserved
    assert [kept is None for _, _, kept in engine._away] == [level == DROPS] * len(before)
    engine.wake(("kv_cache",))
    assert held(engine) == [0] * len(before)
    engine.wake()
    assert held(engine) == before and engine._away == []
    if level == DROPS:
        engine.load(link.pushed(), 4)
    assert sampled(engine)[0] == tokens


def test_memory_of_a_cpu_is_kept(tiny_model_path: Path) -> None:
    engine = rft.TransformersEngine(device="cpu")
    engine.start(str(tiny_model_path), max_model_len=16, seed=0)
    before = held(engine)
    engine.sleep(DROPS)
    assert held(engine) == before and engine._away == []
    engine.stop()


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["expandable_segments:True", "max_split_size_mb:64, expandable_segments: 1"])
def test_memory_that_vllm_could_not_give_back_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    rft.VLLMEngine().check_sharing()
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=rf"{name}=.*take expandable_segments out"):
        rft.VLLMEngine().check_sharing()
    rft.TransformersEngine().check_sharing()
