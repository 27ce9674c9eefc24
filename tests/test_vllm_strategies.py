"""Rule 3 for every strategy with either transport, on the real engine: a token's version is what sampled it.

Every version of the weights is kept, and every token that was trained is computed again with the version that it says.
A version that was not loaded whole, a cache of older weights, or a swap in mid-generation that is off by one token
shows in its log-prob.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median

import pytest

import lightning_rft as rft
from tests.halfway_engines import HalfwayVLLMEngine
from tests.recomputed_tokens import run
from tests.trainer_and_data import fake_data

pytestmark = [pytest.mark.vllm]
pytest.importorskip("vllm")

STEPS = 6
SAME, OTHER = 1e-3, 1e-2
STRATEGIES = {
    "a": lambda transport: rft.Synchronous(transport=transport),
    "b": lambda transport: rft.OneStepOffPolicy(transport=transport),
    "c": lambda transport: rft.FullyAsynchronous(max_staleness=3, transport=transport),
    "d": lambda transport: rft.MultiExplorerAsynchronous(max_staleness=3, transport=transport),
}
TRANSPORTS = {"collective": rft.CollectiveTransport, "checkpoint": rft.CheckpointTransport}


def make_data(dtype: str, explorers: int, folder: Path) -> rft.RFTDataModule:
    engine = HalfwayVLLMEngine(dtype=dtype)
    engine.switch = folder / "wait"
    return fake_data(
        tasks=[f"{i} + 1 =" for i in range(3 * STEPS)],
        reward=lambda completion, task: float(sum(character.isalpha() for character in completion)),
        engine=engine,
        explorers=explorers,
        tasks_per_step=3,
        samples_per_task=3,
        max_new_tokens=60,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rft.RFTDataModule]:
    with make_data("float32", explorers=2, folder=tmp_path_factory.mktemp("engine")) as data:
        yield data


def halfway(data: rft.RFTDataModule, wait: bool) -> None:
    engine = data.engine
    assert isinstance(engine, HalfwayVLLMEngine)
    engine.switch.touch() if wait else engine.switch.unlink(missing_ok=True)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_token_is_of_the_version_that_it_says(
    name: str, transport: str, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    strategy = STRATEGIES[name](TRANSPORTS[transport]())
    halfway(data, strategy.in_flight)
    keep, gaps = run(strategy, data, tiny_model_path, tmp_path, steps=STEPS)
    assert len(keep.turns) == 9 * STEPS
    assert max(gaps.own) <= SAME
    assert median(gaps.other) > OTHER, "one version more must show"
    assert bool(gaps.mixed) == strategy.in_flight, f"{gaps.mixed} turns of more than one version"


def test_a_swap_in_bfloat16(tiny_model_path: Path, tmp_path: Path) -> None:
    with make_data("bfloat16", explorers=1, folder=tmp_path) as data:
        halfway(data, True)
        _, gaps = run(rft.FullyAsynchronous(max_staleness=3), data, tiny_model_path, tmp_path, steps=STEPS)
    assert gaps.mixed
    assert mean(gaps.kl) < 1e-2
