"""GPUs that trainer and explorers share: who holds memory when, whatever happens to explorers meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_rft as rft
from lightning_rft.experience import Task
from lightning_rft.explorer.messages import Load, Sleep, Wake
from lightning_rft.run.coordinator import Coordinator
from tests.run.shared_gpus import SAMPLING, World, run_in

BATCHES = 5
SLEEPS, WAKES = ["Sleep(level=2)", "slept", "trainer"], ["explorers", "Wake(parts=('weights',))", "woken", "loaded"]


def validate(run: Coordinator) -> None:
    run.explore([Task("2 + 2 =", id=f"{index}") for index in range(3)], samples=1, sampling=SAMPLING)
    for index in range(3):
        assert run.explored(index).task_id == f"{index}"


def fit(world: World, run: Coordinator, *, batches: int = BATCHES, validates: float = 0.0) -> None:
    """Trains every batch; validates between two and in the middle of one, each with some probability."""
    run.start()
    run.push_first()
    for batch in range(batches):
        if world.random.random() < validates:
            validate(run)
        run.wanted(batch)
        assert world.trains
        for _ in range(world.random.randrange(20)):
            world.happen()
        if world.random.random() < validates / 2:
            validate(run)
        assert world.trains
        run.trained(batch)
    run.push_last()


@given(
    seed=st.integers(0, 2**32), interval=st.integers(1, 3), explorers=st.integers(1, 3), deaths=st.integers(0, 4),
    capacity=st.sampled_from([None, 2, 3]), validates=st.sampled_from([0.0, 0.7]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_nobody_takes_memory_that_is_not_free_nor_uses_what_sleeps(
    seed: int, interval: int, explorers: int, deaths: int, capacity: int | None, validates: float
) -> None:
    world = World(seed, explorers, deaths)
    run = run_in(world, rft.Synchronous(interval), stop=BATCHES, capacity=capacity)
    fit(world, run, validates=validates)  # engines refuse what cannot be, and the world who takes what is not free
    assert run.version == BATCHES
    awake = [explorer.engine for index, explorer in world.alive.items() if index in world.up and explorer.holds]
    assert {engine.version for engine in awake} <= {BATCHES, -1}
    assert not any(engine._sleeping.parts for engine in awake)


def test_the_order_of_one_explorer() -> None:
    world = World(seed=0, count=1)
    fit(world, run_in(world, rft.Synchronous(), stop=2), batches=2)
    assert world.log == ["explorers", "loaded", *(SLEEPS + WAKES) * 2]


def test_explorers_sleep_through_all_batches_of_a_block_and_keep_weights_that_validation_may_want() -> None:
    world = World(seed=0, count=1)
    run = run_in(world, rft.Synchronous(2), stop=2)
    run.start()
    run.push_first()
    del world.log[:]
    run.wanted(0)
    assert world.log == ["Sleep(level=1)", "slept", "trainer"]  # both batches are explored
    run.trained(0)
    run.wanted(1)
    assert world.log[3:] == []
    validate(run)  # in the middle of batch 1
    assert world.log[3:] == ["explorers", "Wake(parts=('weights', 'kv_cache'))", "woken", *SLEEPS]
    run.trained(1)
    assert world.log[9:] == WAKES


def test_validation_after_the_weights_were_dropped_brings_them_again() -> None:
    world = World(seed=0, count=1)
    run = run_in(world, rft.Synchronous(), stop=2)
    run.start()
    run.push_first()
    run.wanted(0)
    del world.log[:]
    validate(run)
    assert world.log == ["explorers", "Wake(parts=('weights', 'kv_cache'))", "woken", "loaded", *SLEEPS]


def test_where_the_buffer_is_full_explorers_wake_with_the_weights_that_they_have() -> None:
    world = World(seed=0, count=1)
    run = run_in(world, rft.Synchronous(2), stop=2, capacity=2)
    fit(world, run, batches=2)
    assert world.log == [
        *("explorers", "loaded", "Sleep(level=1)", "slept", "trainer"),
        *("explorers", "Wake(parts=('weights', 'kv_cache'))", "woken", *SLEEPS, *WAKES),
    ]


class Dies(World):
    """Its first explorer dies as soon as it is sent such a message, after the first push."""

    kind: Any

    def send(self, index: int, *messages: Any) -> None:
        super().send(index, *messages)
        after = "trainer" in self.log or self.kind is Sleep  # the first push
        if index == 0 and index in self.alive and after and isinstance(messages[0], self.kind):
            self._die(index)


@pytest.mark.parametrize("explorers", [1, 2])
@pytest.mark.parametrize("kind", [Sleep, Wake, Load])
def test_a_death_on_the_way_to_sleep_or_back(kind: Any, explorers: int) -> None:
    world = Dies(seed=1, count=explorers)
    world.kind = kind
    run = run_in(world, rft.Synchronous(), stop=3)
    fit(world, run, batches=3)
    assert (run.version, world.restarts) == (3, 1)


def test_an_explorer_that_dies_asleep_comes_up_when_the_trainer_has_trained() -> None:
    world = World(seed=0, count=2)
    run = run_in(world, rft.Synchronous(), stop=2)
    run.start()
    run.push_first()
    run.wanted(0)
    world._die(0)
    while world.happen():
        assert world.alive.keys() == {1}
    assert world.restarts == 1
    run.trained(0)
    run.wanted(1)
    run.trained(1)
    run.push_last()
    assert run.version == 2 and world.alive.keys() == {1, 2}


def test_an_explorer_that_is_coming_up_is_waited_for_and_put_to_sleep() -> None:
    world = World(seed=0, count=2)
    run = run_in(world, rft.Synchronous(), stop=1)
    run.start()
    run.push_first()
    while not run._groups.leased:  # batch 0 is explored, as far as there is anything to do
        if not world.happen():
            break
    world._die(0)
    while 0 in world.gone or world.coming_up is False:
        world.happen()
    assert set(world.up) == {1} and 2 in world.alive
    run.wanted(0)
    assert set(world.up) == {1, 2} and not any(explorer.holds for explorer in world.alive.values())
    run.trained(0)
    run.push_last()
    assert {explorer.engine.version for explorer in world.alive.values()} == {1}


@pytest.mark.parametrize(("kind", "what"), [(Sleep, "fall asleep"), (Wake, "wake")])
def test_an_explorer_that_does_not_answer_in_time_is_ended(kind: Any, what: str) -> None:
    class Deaf(World):
        def send(self, index: int, *messages: Any) -> None:
            super().send(index, *messages)
            if index == 0 and index in self.alive and isinstance(messages[0], kind):
                self.alive[index].deaf = True

    world = Deaf(seed=0, count=2)
    run = run_in(world, rft.Synchronous(), stop=2, sleep_s=0.05)
    fit(world, run, batches=2)
    assert f"did not {what} within Timeouts(sleep_s=0.05)" in world.log
    assert (run.version, world.restarts) == (2, 1)
