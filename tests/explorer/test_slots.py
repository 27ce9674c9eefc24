"""Slots never idle while groups wait: the shipped schedule and worker around an engine whose steps are the clock."""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.experience import GroupKey, Task
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.messages import Ended, Explore, Explored, Several, Started
from lightning_rft.explorer.spec import ExplorerSpec
from lightning_rft.explorer.worker.explorer import Explorer
from lightning_rft.explorer.workflows.single_turn import SingleTurn
from lightning_rft.model_folder import Pretrained
from lightning_rft.settings import Sampling, Timeouts, Tolerance
from lightning_rft.sync.order import Order
from lightning_rft.sync.schedule import Action, Issue, Lease, Schedule
from lightning_rft.sync.synchronous import Synchronous

SLOTS = 64
MEAN, SIGMA = 32, 0.8  # of the lengths, which are lognormal, in tokens
SAMPLES = 120 * SLOTS  # of the batch: at its end slots idle, for the length of an answer
SETTLED = 40  # turns of the event loop after which nothing happens by itself


class Clock(FakeEngine):
    """Samples as many tokens as it is told; before each step all that follows from the last one happens."""

    def __init__(self, lengths: dict[GroupKey, Sequence[int]], delay: int) -> None:
        super().__init__(max_num_seqs=SLOTS)
        self.lengths = lengths
        self.delay = delay
        self.steps = 0
        self.answers: deque[tuple[int, Any]] = deque()  # of rank 0, with the step before which each arrives

    def add(self, request: Request) -> None:
        _, batch, slot, _, sample, *_ = map(int, request.id.split("/"))
        length = self.lengths[GroupKey(batch, slot)][sample]
        super().add(replace(request, sampling=replace(request.sampling, max_new_tokens=length)))
        self._running[request.id].limit = length

    def step(self) -> list[Completion]:
        asyncio.run_coroutine_threadsafe(self._settle(), self.loop).result()
        self.steps += 1
        return super().step()

    async def _settle(self) -> None:
        for _ in range(SETTLED):
            await asyncio.sleep(0)
        while self.answers and self.answers[0][0] <= self.steps:
            self.inbox.put_nowait(self.answers.popleft()[1])
            for _ in range(SETTLED):
                await asyncio.sleep(0)


class Rank0:
    """The other end of the line: the schedule, for one batch."""

    def __init__(self, engine: Clock, samples: int) -> None:
        self.engine = engine
        self.samples = samples
        groups = len(engine.lengths)
        self.schedule = Schedule(Order(Synchronous(), size=lambda batch: groups, stop=1), samples)
        self.done = asyncio.Event()

    def send(self, message: Any) -> None:
        if isinstance(message, Started):
            for actions in (
                self.schedule.joined(0, message.room),
                self.schedule.loaded(0, 0),
                self.schedule.pushed(0),
                self.schedule.wanted(0),
            ):
                self.carry_out(actions, self.engine.steps)
        elif isinstance(message, Ended):
            assert message.run == 1
            ended = {key: number for (key, _), number in message.samples.items()}
            self.carry_out(self.schedule.samples_ended(ended), self.engine.steps + self.engine.delay)
        elif isinstance(message, Explored):
            assert not message.failures
            self.carry_out(self.schedule.ready(message.key), self.engine.steps + self.engine.delay)

    def carry_out(self, actions: Sequence[Action], when: int) -> None:
        issued = [action.group for action in actions if isinstance(action, Issue)]
        asked = [
            Explore(1, key, 1, Task("1 =", id="t"), tuple(range(self.samples)), Sampling(8, 1.0)) for key in issued
        ]
        if asked and self.engine.has_work:
            self.engine.answers.append((when, Several(tuple(asked))))
        elif asked:  # nothing moves the clock
            self.engine.inbox.put_nowait(Several(tuple(asked)))
        if any(isinstance(action, Lease) for action in actions):
            self.done.set()


def draw_lengths(samples: int, groups: int) -> dict[GroupKey, list[int]]:
    draws = random.Random(samples)
    mu = math.log(MEAN) - SIGMA**2 / 2
    return {
        GroupKey(0, slot): [max(1, round(draws.lognormvariate(mu, SIGMA))) for _ in range(samples)]
        for slot in range(groups)
    }


def makespan(model: Path, lengths: dict[GroupKey, list[int]], delay: int) -> int:
    """Steps of the engine until a batch has come back."""

    async def score(completion: str, task: Task) -> float:
        return 1.0

    async def run() -> int:
        engine = Clock(lengths, delay)
        engine.loop, engine.inbox = asyncio.get_running_loop(), asyncio.Queue()
        spec = ExplorerSpec(
            engine=engine,
            model=Pretrained(str(model)),
            workflow=SingleTurn(),
            reward=score,
            max_model_len=10_000,
            seed=0,
            tolerance=Tolerance(retries=0),
            timeouts=Timeouts(),
        )
        rank0 = Rank0(engine, len(lengths[GroupKey(0, 0)]))
        explorer = Explorer(rank0, spec)  # type: ignore[arg-type]
        serving = asyncio.create_task(explorer.serve(engine.inbox))
        try:
            await asyncio.wait_for(rank0.done.wait(), 120)
            engine.inbox.put_nowait(None)
            await serving
            return engine.steps
        finally:
            explorer.stop()

    return asyncio.run(run())


def queued(lengths: dict[GroupKey, list[int]]) -> int:
    """The same for all requests queued in the engine from the start."""
    slots = [0] * SLOTS
    for length in (length for group in lengths.values() for length in group):
        heapq.heapreplace(slots, slots[0] + length)
    return max(slots)


@pytest.mark.parametrize("delay", [0, 1, 4])
@pytest.mark.parametrize("samples", [8, 16, 33])
def test_a_batch_takes_hardly_longer_than_its_tokens_need(tiny_model_path: Path, samples: int, delay: int) -> None:
    lengths = draw_lengths(samples, groups=SAMPLES // samples)
    flat = [length for group in lengths.values() for length in group]
    steps = makespan(tiny_model_path, lengths, delay)
    assert steps <= 1.1 * max(*flat, sum(flat) / SLOTS)
    assert steps <= 1.02 * queued(lengths)
