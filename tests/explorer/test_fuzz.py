"""All that users hand in: it costs its own sample at most, changes no other, and only what is finite comes back."""

from __future__ import annotations

import asyncio
import math
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lightning_rft.buffer.ledger import Ledger
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group, GroupKey, Task
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.messages import Explore, Explored
from lightning_rft.explorer.spec import ExplorerSpec
from lightning_rft.explorer.worker.explorer import Explorer
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.model_folder import Pretrained
from lightning_rft.run.error_rate import ErrorRate
from lightning_rft.settings import Sampling, Timeouts, Tolerance
from lightning_rft.tasks.sources import as_tasks

SAMPLES = 4
GOOD = "good"


class Vexed(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    def __reduce__(self) -> Any:
        raise ValueError("no pickle")


TEXT = st.text(max_size=8) | st.text(st.characters(exclude_categories=()) | st.just("\ud800"), max_size=4)
NUMBERS = st.integers() | st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1e39, -1e300, 10**400, 3.4e38])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CHATS = st.lists(st.fixed_dictionaries({"role": TEXT | st.just("user"), "content": JSON}), max_size=3)
ERRORS = st.one_of(
    st.builds(LookupError, TEXT),
    st.sampled_from(
        [
            *(Vexed(), SystemExit(0), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit(), TimeoutError()),
            *(StopIteration(), MemoryError(), RecursionError(), ExceptionGroup("two", [ValueError("\ud800")])),
        ]
    ),
)
# What a sample does: what its workflow asks, answers or raises, and what its reward answers or raises.
WRONGS = st.one_of(
    st.just(GOOD),
    st.tuples(st.just("prompt"), TEXT | JSON | CHATS),
    st.tuples(st.just("answer"), TEXT | JSON),
    st.tuples(st.just("reward"), NUMBERS | JSON),
    st.tuples(st.sampled_from(["raise", "reward raises"]), ERRORS),
)


class Rank0:
    """An explorer on a thread of its own, and what would become of its answers."""

    def __init__(self, model: Path) -> None:
        self.doing: list[Any] = []
        self.batch = 0
        self.ended: BaseException | None = None
        self.answers: asyncio.Queue[Explored] = asyncio.Queue()
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.serve(model),), daemon=True)
        self.thread.start()

    async def serve(self, model: Path) -> None:
        spec = ExplorerSpec(
            engine=FakeEngine(),
            model=Pretrained(str(model)),
            workflow=self.workflow,
            reward=self.reward,
            max_model_len=40,
            seed=0,
            tolerance=Tolerance(retries=0),
            timeouts=Timeouts(),
        )
        explorer = Explorer(self, spec)
        try:
            await explorer.serve(self.inbox)
        except BaseException as error:
            self.ended = error
            raise
        finally:
            explorer.stop()

    def send(self, message: Any) -> None:
        if isinstance(message, Explored):
            self.answers.put_nowait(message)

    async def workflow(self, task: Task, policy: Policy) -> Any:
        what, value = self.does(policy)
        text = await policy(value if what == "prompt" else task.prompt)
        if what == "raise":
            raise value
        task.metadata["what"], task.metadata["value"] = what, value  # type: ignore[index]
        return value if what == "answer" else text

    async def reward(self, completion: str, task: Task) -> Any:
        if task.metadata["what"] == "reward raises":
            raise task.metadata["value"]
        return task.metadata["value"] if task.metadata["what"] == "reward" else 1.0

    def does(self, policy: Policy) -> Any:
        doing = self.doing[int(policy._name.split("/")[4])]
        return (GOOD, None) if doing == GOOD else doing

    def ask(self, task: Task, doing: list[Any]) -> Explored:
        assert self.ended is None  # a sample has ended the explorer
        self.doing = doing
        self.batch += 1
        seeds = tuple(range(len(doing)))
        message = Explore(1, GroupKey(self.batch, 0), 1, task, seeds, Sampling(8, 1.0))
        self.loop.call_soon_threadsafe(self.inbox.put_nowait, message)
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(self.answers.get(), 5), self.loop).result(5)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.inbox.put_nowait, None)
        self.thread.join(30)
        self.loop.close()


@pytest.fixture(scope="module")
def rank0(tiny_model_path: Path) -> Iterator[Rank0]:
    started = Rank0(tiny_model_path)
    yield started
    assert started.thread.is_alive()  # nothing has ended it
    started.close()


def is_fine(doing: Any) -> bool | None:
    """Whether a sample that does this succeeds; ``None`` where that is not obvious."""
    what, value = (GOOD, None) if doing == GOOD else doing
    if what == "reward":
        if not isinstance(value, int | float) or value != value or abs(value) > 3.5e38:
            return False
        return abs(value) < 3e38 or None
    if what == "answer":
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return True if what == GOOD else None if what == "prompt" else False


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # to shrink an example that ends the explorer would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    doing=st.lists(WRONGS, min_size=SAMPLES, max_size=SAMPLES), prompt=st.just("1 + 1 =") | TEXT, rest=JSON, name=TEXT
)
def test_whatever_a_sample_does(rank0: Rank0, doing: list[Any], prompt: str, rest: Any, name: str) -> None:
    try:
        (task,) = as_tasks([{"prompt": prompt, "answer": rest, "id": name, "more": rest}])
    except ConfigurationError:  # refused before the start
        task = Task("1 + 1 =", id="t")
    alone = rank0.ask(task, [GOOD] * SAMPLES)
    answer = rank0.ask(task, doing)
    assert len(answer.experiences) + len(answer.failures) == SAMPLES
    came = {experience.sample: experience for experience in answer.experiences}
    for index, what in enumerate(doing):
        fine = is_fine(what)
        assert fine is None or fine == (index in came) or not alone.experiences
        if what == GOOD and alone.experiences:
            assert came[index].turns == alone.experiences[index].turns
    for experience in answer.experiences:
        assert math.isfinite(struct.unpack("<f", struct.pack("<f", experience.reward))[0])
    store(answer)


def store(answer: Explored) -> None:
    """What rank 0 does with it."""
    ErrorRate(1.0, window=1000).take(answer, "explorer 0")
    for failure in answer.failures:
        assert isinstance(failure.unpack("explorer 0"), Exception)
    with Ledger.open(":memory:") as ledger:
        ledger.begin()
        ledger.issue(answer.key, answer.task_id, epoch=0, explorer=0)
        if len(answer.experiences) == SAMPLES:
            ledger.ready(Group(answer.key, answer.task_id, answer.experiences))
            (group,) = ledger.read([answer.key])
            assert group.experiences == answer.experiences
        else:
            ledger.failed(answer.key, answer.failures[0].text, step=0)
