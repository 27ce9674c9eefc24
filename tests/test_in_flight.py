"""Weights that change in mid-generation: every token is of the version that it says, to 1e-4 in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

import lightning_rft as rft
from tests.halfway_engines import HalfwayTransformersEngine
from tests.recomputed_tokens import run
from tests.trainer_and_data import fake_data

STEPS = 6
SAME, OTHER = 1e-4, 1e-2


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rft.RFTDataModule]:
    engine = HalfwayTransformersEngine(dtype="float32", device="cpu")
    engine.switch = tmp_path_factory.mktemp("engine") / "wait"
    with fake_data(
        tasks=[f"{index} + 1 =" for index in range(3 * STEPS)],
        reward=lambda completion, task: float(sum(map(ord, completion)) % 7),
        engine=engine,
        tasks_per_step=3,
        samples_per_task=3,
        max_new_tokens=60,
    ) as data:
        yield data


@pytest.mark.parametrize("in_flight", [True, False])
@pytest.mark.parametrize("strategy", [rft.OneStepOffPolicy, rft.FullyAsynchronous])
def test_versions_are_exact_across_a_swap(
    strategy: type[rft.SyncStrategy], in_flight: bool, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    engine = data.engine
    assert isinstance(engine, HalfwayTransformersEngine)
    engine.switch.touch() if in_flight else engine.switch.unlink(missing_ok=True)
    _, gaps = run(strategy(in_flight=in_flight), data, tiny_model_path, tmp_path, steps=STEPS)
    assert max(gaps.own) <= SAME
    assert median(gaps.other) > OTHER, "one version more must show"
    assert bool(gaps.mixed) == in_flight, f"{gaps.mixed} turns of more than one version"
