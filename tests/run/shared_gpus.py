"""Explorers that share the trainer's GPUs, without processes: one thing happens at a time, in an order that is drawn.

Everything of rank 0 is real but the pool and the listener's thread; so are the engines, which refuse what cannot be.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import MagicMock

import torch

import lightning_rft as rft
from lightning_rft.errors import ExplorerError
from lightning_rft.experience import Experience, Task, Turn
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.engines.sleeping import PARTS
from lightning_rft.explorer.messages import (
    Died,
    Explore,
    Explored,
    Load,
    Loaded,
    Scored,
    Several,
    Sleep,
    Slept,
    Started,
    Wake,
    Woken,
)
from lightning_rft.monitor.activity import Activity
from lightning_rft.monitor.status import StatusLine
from lightning_rft.run.agreement import Agreement
from lightning_rft.run.coordinator import Coordinator
from lightning_rft.run.dispatcher import Dispatcher
from lightning_rft.run.error_rate import ErrorRate
from lightning_rft.run.groups import Groups
from lightning_rft.settings import Sampling, Timeouts
from lightning_rft.sync.order import Order
from lightning_rft.sync.rule import Rule
from lightning_rft.sync.schedule import Schedule
from lightning_rft.sync.transports.transport import Transport, Weights
from lightning_rft.trainer import offload
from lightning_rft.trainer.scoring import Announcement, Scores
from tests.explorer.links import MemoryLink

SAMPLING = Sampling(max_new_tokens=3, temperature=1.0, seed=0)
SAMPLES = 2


class Explorer:
    """An explorer: does the next thing that it was told, or a step; ``deaf`` ones do nothing."""

    def __init__(self) -> None:
        self.engine = rft.FakeEngine(mean_tokens=2, max_num_seqs=4)
        self.engine.start("model", max_model_len=20, seed=0)
        self.engine.connect(MemoryLink())
        self.inbox: deque[Any] = deque()
        self.outbox: deque[Any] = deque([Started("float32", 1, False, 4)])
        self.deaf = False
        self._groups: dict[str, tuple[Explore, list[Completion]]] = {}

    @property
    def holds(self) -> bool:
        """Whether it holds any of the GPU's memory."""
        return self.engine._sleeping.parts != set(PARTS)

    @property
    def can_act(self) -> bool:
        return not self.deaf and (bool(self.inbox) or self.engine.has_work)

    def act(self) -> None:
        if not self.inbox:
            self._step()
            return
        message = self.inbox.popleft()
        if isinstance(message, Several):
            self.inbox.extendleft(reversed(message.messages))
        elif isinstance(message, Explore):
            name = f"{message.key}-{message.attempt}"
            self._groups[name] = message, []
            for index in range(len(message.seeds)):
                self.engine.add(Request(f"{name}/{index}", (1, 2), SAMPLING))
        elif isinstance(message, Load):
            self.engine.load(message.manifest, message.version)
            self.engine.wake()
            self.outbox += [Loaded(message.version), Scored(message.version)]
        elif isinstance(message, Sleep):
            self.engine.sleep(message.level)
            self.outbox.append(Slept())
        elif isinstance(message, Wake):
            self.engine.wake(message.parts)
            self.outbox.append(Woken(message.parts))

    def _step(self) -> None:
        for completion in self.engine.step():
            name = completion.request_id.split("/")[0]
            asked, done = self._groups[name]
            done.append(completion)
            if len(done) == len(asked.seeds):
                del self._groups[name]
                experiences = tuple(map(_experience, range(len(done)), done))
                self.outbox.append(Explored(7, asked.key, asked.attempt, asked.task.id, experiences))


def _experience(index: int, done: Completion) -> Experience:
    turn = Turn((1, 2), done.token_ids, done.logprobs, done.versions, done.finish_reason)
    return Experience("t", index, (turn,), 1.0)


class World:
    """The pool of such explorers, whoever listens to them, and the trainer's memory.

    ``deaths`` explorers die at any time, and others are started for them.
    """

    dtype, nccl = "float32", False

    def __init__(self, seed: int, count: int, deaths: int = 0) -> None:
        self.random = Random(seed)
        self.count = count
        self.deaths = deaths
        self.restarts = 0
        self.trains = False  # whether the trainer holds its memory
        self.log: list[str] = []  # what happened to memory and weights, in order
        self.heard = 0.0
        self.closed = False
        self._held = False
        self._vacant = count
        self._next = 0
        self.alive: dict[int, Explorer] = {}
        self.gone: dict[int, Explorer] = {}  # whose death nobody has heard of
        self.up: dict[int, Started] = {}
        self.handle: Callable[[int, Any], None] = lambda explorer, message: None

    # What happens

    def happen(self) -> bool:
        """Lets one thing happen that can; whether there was any."""
        events: list[Callable[[], None]] = []
        for index, explorer in self.alive.items():
            if explorer.can_act:
                events.append(explorer.act)
            if explorer.outbox:
                events.append(lambda index=index: self._deliver(index))  # type: ignore[misc]
        for index in self.gone:
            events.append(lambda index=index: self._deliver(index))  # type: ignore[misc]
        if self._vacant and not self._held:
            events.append(self._spawn)
        if self.deaths and self.alive and self.random.random() < 0.05:
            events = [lambda: self._die(self.random.choice(list(self.alive)))]
            self.deaths -= 1
        if not events:
            return False
        self.random.choice(events)()
        self.check()
        return True

    def check(self) -> None:
        """No explorer holds memory, nor takes any at its start, while the trainer holds its."""
        if self.trains:
            assert not any(explorer.holds for explorer in self.alive.values()), self.log

    def together(self, what: Any, how: Any) -> Iterator[Any]:
        if isinstance(what, offload.Turn):
            self.trains = what is offload.Turn.TRAINER
            self.log.append("trainer" if self.trains else "explorers")
            self.check()
            yield what
        elif what == "scores":
            assert not self.trains, self.log
            yield Scores((1, 2), (-1.0,), 1.0, "float32")
        else:
            yield Announcement([], torch.device("cpu"), (1, 2))

    def _spawn(self) -> None:
        self._vacant -= 1
        self.alive[self._next] = Explorer()
        self._next += 1

    def _die(self, index: int) -> None:
        self.gone[index] = self.alive.pop(index)

    def _deliver(self, index: int) -> None:
        explorer = self.alive.get(index) or self.gone[index]
        if explorer.outbox:
            message = explorer.outbox.popleft()
        else:
            message = Died(ExplorerError("killed"))
            del self.gone[index]
            self.up.pop(index, None)
            self._vacant += 1
            self.restarts += 1
        if isinstance(message, Started):
            self.up[index] = message
        elif isinstance(message, Slept | Woken | Loaded):
            self.log.append(type(message).__name__.lower())
        self.handle(index, message)

    # The pool

    @property
    def ready(self) -> bool:
        return len(self.up) == self.count

    @property
    def coming_up(self) -> bool:
        return len(self.up) + self._vacant < self.count

    def hold(self, held: bool) -> None:
        self._held = held

    def send(self, index: int, *messages: Any) -> None:
        if index in self.alive:
            self.alive[index].inbox.extend(messages)
            self.log += [f"{m}" for m in messages if isinstance(m, Sleep | Wake)]

    def kill(self, index: int, blame: str) -> None:
        self.log.append(blame)
        if index in self.alive:
            self._die(index)

    # Whoever listens

    def start(self) -> None: ...

    def raise_failures(self) -> None: ...

    def failed(self, error: BaseException) -> None:
        raise error

    def locked(self) -> Any:
        return nullcontext()

    def wait(
        self,
        done: Callable[[], bool],
        what: str,
        timeout_s: float | None = None,
        show: Callable[[], None] = lambda: None,
    ) -> None:
        began = time.monotonic()
        while not done():
            show()
            if not self.happen():  # but that time passes
                assert time.monotonic() - began < 5, f"nothing can happen any more while the trainer waits for {what}"


class Straight(Transport):
    """Has explorers load nothing but a version."""

    def push(self, weights: Weights, version: int, explorers: Any, to: Sequence[int] | None = None) -> None:
        members = [explorer for explorer in explorers.members() if to is None or explorer in to]
        for explorer in members:
            explorers.load(explorer, weights.manifest, version)
        self.end_late(explorers.wait_loaded(version, members, 60), "load", explorers)


def run_in(world: World, rule: Rule, *, stop: int, capacity: int | None = None, sleep_s: float = 60.0) -> Coordinator:
    """The run of two groups a batch that knows these explorers; nothing has happened yet."""
    cursor = MagicMock()
    cursor.task.side_effect = lambda key: Task("1 + 1 =", id=f"{key}")
    cursor.sample_seed.side_effect = lambda key, sample: sample
    cursor.plan.tasks_per_step = cursor.left_out = 2
    groups = Groups(
        MagicMock(), cursor, rft.Buffer(),
        incarnation=7, samples_per_task=SAMPLES, min_samples=1, sampling=SAMPLING, max_staleness=rule.max_staleness,
    )  # fmt: skip
    groups.lost = lambda *_: None  # type: ignore[method-assign]  # several deaths are no group's fault here
    dispatcher = Dispatcher(
        Schedule(Order(rule, size=lambda batch: 2, stop=stop, capacity=capacity), samples=SAMPLES),
        groups, world, ErrorRate(0.5, 1000), Activity(()), Agreement(None, lambda: "float32"),  # type: ignore[arg-type]
        timeouts=Timeouts(), check_interrupt=lambda: None, load_label="load",
    )  # fmt: skip
    world.handle = dispatcher.handle
    dispatcher.listener = world  # type: ignore[assignment]
    return Coordinator(
        dispatcher, Straight(), background=False, gathered=world.together, folder=Path(), status=StatusLine(None),
        sleep_s=sleep_s,
    )  # fmt: skip
