"""Samples that go on from the tokens that a dead explorer had sampled: each token once, as it was sampled."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lightning_rft.errors import ScheduleError
from lightning_rft.experience import Experience, GroupKey, Task, TensorInfo, Turn
from lightning_rft.explorer import partials
from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.engines.transformers import TransformersEngine
from lightning_rft.explorer.engines.vllm_sampling import rest
from lightning_rft.explorer.messages import Advanced, Explore, Explored, Sampled, Started
from lightning_rft.explorer.partials import Part, joined
from lightning_rft.explorer.spec import ExplorerSpec
from lightning_rft.explorer.worker import explorer as worker
from lightning_rft.explorer.worker.calls import Call, go_on, news
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.explorer.workflows.single_turn import SingleTurn
from lightning_rft.model_folder import Pretrained
from lightning_rft.run.partials import Partials
from lightning_rft.settings import Sampling, Timeouts, Tolerance
from lightning_rft.testing import tiny_model

KEY = GroupKey(0, 0)
DEADLINE_S = 20.0


# Every order of steps, swaps, messages and deaths


@dataclass
class Drawn:
    """One token that was ever sampled; its log-prob is its own."""

    position: int
    token: int
    logprob: float
    version: int


class Numbered(Engine):
    """Samples what its random numbers say, and writes every token down."""

    def __init__(self, drawn: list[Drawn], version: int) -> None:
        super().__init__()
        self.drawn = drawn
        self.first = version

    def start(self, model: Any, *, max_model_len: int, seed: int) -> None:
        super().start(model, max_model_len=max_model_len, seed=seed)
        self.version = self.first

    def step(self) -> list[Completion]:
        finished = []
        for running in self._batch():
            token, logprob = int(running.rng.random() * 40), -(len(self.drawn) + 1) / 1024
            self.drawn.append(Drawn(len(running.token_ids), token, logprob, self.version))
            running.extend([token], [logprob], self.version)
            if running.request.sampling.keeps_support:
                running.choose_from(choices(token, logprob))
            if reason := self._reason(running):
                finished.append(self._finish(running, reason))
        return finished

    def load(self, manifest: Sequence[TensorInfo], version: int) -> None:
        raise NotImplementedError

    def prompt_logprobs(self, prompt_ids: Sequence[int]) -> list[float]:
        return []


def choices(token: int, logprob: float) -> dict[int, float]:
    return {token + further: logprob - further for further in range(1 + token % 3)}


@dataclass
class Life:
    """What one explorer does with a call before it dies: the version it begins with, then one thing after another."""

    version: int
    doing: list[str] = field(default_factory=list)


DOING = st.lists(st.sampled_from(["step", "step", "step", "tell", "swap"]), max_size=25)
LIVES = st.lists(st.builds(Life, st.integers(0, 3), DOING), max_size=4)


def begin(engine: Engine, call: Call, kept: Partials) -> int:
    """Begins a call with what is kept of it; returns how many tokens that is."""
    go_on(call, {(part.sample, part.call): part.tokens for part in kept.of(KEY)}, engine.version)
    if call.done is not None:
        return len(call.done.token_ids)
    engine.add(call.request)
    return 0 if call.request.kept is None else len(call.request.kept.token_ids)


def tell(engine: Engine, calls: dict[str, Call], kept: Partials) -> int:
    """Tells rank 0 the news of calls; returns of how many tokens."""
    told = {name: call.told for name, call in calls.items() if call.done is None}
    sampled = {completion.request_id: completion for completion in engine.sampled(told)}
    parts = tuple(news(calls, sampled))
    kept.take(Sampled(1, KEY, 1, parts))
    return sum(part.tokens.num_tokens for part in parts)


@settings(max_examples=200, deadline=None)
@given(lives=LIVES, last=st.integers(0, 3), top_k=st.sampled_from([None, 4]), tokens=st.integers(1, 30))
def test_each_token_is_sampled_once_and_kept_as_it_was(
    lives: list[Life], last: int, top_k: int | None, tokens: int
) -> None:
    request = Request("r", (1, 2), Sampling(tokens, 1.0, seed=5, top_k=top_k))
    drawn: list[Drawn] = []
    kept, lost = Partials(), 0
    held = 0  # tokens that the last life has had
    for life in [*lives, Life(last, ["step"] * tokens)]:
        engine = Numbered(drawn, life.version)
        engine.start("none", max_model_len=100, seed=0)
        call = Call(0, request)
        began = begin(engine, call, kept)
        calls = {"r": call} if call.done is None else {}
        lost += held - began
        held = began
        told = 0
        for what in life.doing:
            if what == "swap":
                engine.version += 1
            elif what == "tell" and (call.done is None or calls):
                told += tell(engine, calls, kept)
                assert told == held  # each token once
                for part in kept.of(KEY) if told else ():
                    assert part.tokens.num_tokens == held
                    assert bool(part.tokens.finish_reason) == (call.done is not None)
            elif call.done is None:
                held += 1
                for completion in engine.step():
                    call.done = completion
    done = call.done
    assert done is not None and done.finish_reason == "length"
    assert len(done.token_ids) == tokens
    assert len(drawn) == tokens + lost  # what was never told, or was of newer weights than those that followed
    alone = Numbered([], 0)
    alone.start("none", max_model_len=100, seed=0)
    alone.add(request)
    (undisturbed,) = [completion for _ in range(tokens) for completion in alone.step()]
    assert done.token_ids == undisturbed.token_ids  # no random number was used twice
    assert list(done.versions) == sorted(done.versions)
    own = {one.logprob: one for one in drawn}
    of_answer = zip(done.token_ids, done.logprobs, done.versions, strict=True)
    for position, (token, logprob, version) in enumerate(of_answer):
        assert own.pop(logprob) == Drawn(position, token, logprob, version)
    if top_k is None:
        assert done.support is None
    else:
        assert done.support is not None
        expected = [choices(*pair) for pair in zip(done.token_ids, done.logprobs, strict=True)]
        assert done.support.counts.tolist() == list(map(len, expected))
        assert done.support.token_ids.tolist() == [token for one in expected for token in one]
        assert done.support.logprobs.tolist() == [logprob for one in expected for logprob in one.values()]


def test_a_part_without_those_before_it_is_refused() -> None:
    part = Part(0, b"call", 3, Turn((), (1,), (-1.0,), (0,), ""))
    with pytest.raises(ScheduleError, match="tokens from 3 on came after 0 of their answer"):
        joined([part])


def test_thousands_of_parts_are_joined_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 joins them while nobody else is heard: not once more for each part."""
    parts = [Part(0, b"call", at, Turn((), (at,), (-1.0,), (at // 1000,), "")) for at in range(3000)]
    made: list[Turn] = []
    monkeypatch.setattr(partials, "Turn", lambda *args, **named: made.append(Turn(*args, **named)) or made[-1])
    whole = joined(parts)
    assert made == [whole] and whole.token_ids.tolist() == list(range(3000))
    assert whole.version_runs == [(0, 1000), (1, 1000), (2, 1000)]


def test_a_call_is_known_by_what_it_asks() -> None:
    request = Request("one", (1, 2), Sampling(8, 1.0, seed=3))
    assert replace(request, id="another").fingerprint == request.fingerprint
    others = [
        replace(request, prompt_ids=(1, 3)),
        replace(request, sampling=Sampling(8, 1.0, seed=4)),
        replace(request, sampling=Sampling(8, 0.9, seed=3)),
    ]
    assert len({request.fingerprint, *(other.fingerprint for other in others)}) == 4
    call = Call(0, others[0])
    go_on(call, {(0, request.fingerprint): Turn((), (1,), (-1.0,), (0,), "")}, 0)
    assert call.request.kept is None


def test_a_grammar_does_not_begin_in_mid_answer() -> None:
    request = Request("r", (1,), Sampling(8, 1.0, seed=3, structured={"choice": ["yes"]}))
    call = Call(0, request)
    go_on(call, {(0, request.fingerprint): Turn((), (1,), (-1.0,), (0,), "")}, 0)
    assert call.request.kept is None
    go_on(call, {(0, request.fingerprint): Turn((), (1,), (-1.0,), (0,), "stop")}, 0)
    assert call.done is not None  # that one is whole


def test_what_vllm_is_asked_for_is_the_rest() -> None:
    sampling = Sampling(10, 1.0, seed=3, top_k=5, min_new_tokens=4)
    engine = Numbered([], 0)
    engine.start("none", max_model_len=100, seed=0)
    seeds = []
    for count in (0, 3, 6):
        kept = Completion(str(count), (1,) * count, (-1.0,) * count, (0,) * count, "")
        engine.add(Request(str(count), (1, 2), sampling, kept if count else None))
        left = rest(engine._running[str(count)])
        assert (left.max_new_tokens, left.min_new_tokens) == (10 - count, max(0, 4 - count))
        assert (left.top_k, left.temperature) == (5, 1.0)
        seeds.append(left.seed)
    assert seeds[0] == 3 and len(set(seeds)) == 3


# Engines


@pytest.mark.usefixtures("one_thread")
def test_transformers_goes_on_where_another_engine_was(tmp_path: Path) -> None:
    """The same tokens as without a break, and after a change of weights the log-probs of the new ones."""
    paths = [tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    requests = [
        Request(str(index), prompt, Sampling(20, 0.8, seed=index, top_k=(index == 2) * 8))
        for index, prompt in enumerate([(7, 8, 9), (30,), (11, 50, 60, 12, 90)])
    ]

    def engine(path: Path) -> TransformersEngine:
        made = TransformersEngine(dtype="float32", device="cpu")
        made.start(str(path), max_model_len=100, seed=0)
        return made

    def answers(engine: TransformersEngine, asked: Iterable[Request]) -> dict[str, Completion]:
        for request in asked:
            engine.add(request)
        done: dict[str, Completion] = {}
        while engine.has_work:
            done.update((completion.request_id, completion) for completion in engine.step())
        return done

    whole = answers(engine(paths[0]), requests)
    first = engine(paths[0])
    for request in requests:
        first.add(request)
    for _ in range(8):
        assert not first.step()
    kept = {completion.request_id: completion for completion in first.sampled(dict.fromkeys("012", 0))}
    assert [len(one.token_ids) for one in kept.values()] == [8, 8, 8]
    asked = [replace(request, kept=kept[request.id]) for request in requests]
    same = answers(engine(paths[0]), asked)
    other = answers(engine(paths[1]), asked)
    model: Any = AutoModelForCausalLM.from_pretrained(paths[1]).eval()
    for request in requests:
        assert same[request.id].token_ids == whole[request.id].token_ids
        assert same[request.id].logprobs == pytest.approx(whole[request.id].logprobs, abs=1e-4)
        support, expected_support = same[request.id].support, whole[request.id].support
        if support is not None and expected_support is not None:
            assert support.counts.tolist() == expected_support.counts.tolist() == [8] * 20
            assert support.token_ids.tolist() == expected_support.token_ids.tolist()
        gone_on = other[request.id]
        assert gone_on.token_ids[:8] == whole[request.id].token_ids[:8]
        assert gone_on.logprobs[:8] == kept[request.id].logprobs
        if support is None:
            ids = torch.tensor([[*request.prompt_ids, *gone_on.token_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float() / 0.8
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(gone_on.token_ids)[:, None])[:, 0].tolist()
            assert gone_on.logprobs[8:] == pytest.approx(expected[8:], abs=1e-4)
            assert gone_on.logprobs[:8] != pytest.approx(expected[:8], abs=1e-2)  # those are the old weights'


# Explorers


class Counting(FakeEngine):
    """Counts the tokens that it samples, and begins with a version."""

    def __init__(self, version: int, **settings: Any) -> None:
        super().__init__(mean_tokens=100_000, **settings)
        self.first = version
        self.tokens = 0

    def start(self, model: Any, *, max_model_len: int, seed: int) -> None:
        super().start(model, max_model_len=max_model_len, seed=seed)
        self.version = self.first

    def step(self) -> list[Completion]:
        self.tokens += len(self._running)
        return super().step()


class Rank0:
    """The other end of an explorer's line."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.kept = Partials()

    def send(self, message: Any) -> None:
        if isinstance(message, Sampled):
            self.kept.take(message)
        self.messages.put_nowait(message)

    async def heard(self, kind: type) -> Any:
        while not isinstance(message := await asyncio.wait_for(self.messages.get(), DEADLINE_S), kind):
            pass
        return message


@asynccontextmanager
async def exploring(model: Path, engine: FakeEngine, **changes: Any) -> AsyncIterator[Rank0]:
    """An explorer in this process, until it dies at the end."""
    rank0 = Rank0()
    given: dict[str, Any] = {
        "engine": engine,
        "model": Pretrained(str(model)),
        "workflow": SingleTurn(),
        "reward": length,
        "max_model_len": 1000,
        "seed": 0,
        "tolerance": Tolerance(retries=0),
        "timeouts": Timeouts(),
    }
    explorer = worker.Explorer(rank0, ExplorerSpec(**given | changes))
    serving = asyncio.ensure_future(explorer.serve(rank0.inbox))
    try:
        await rank0.heard(Started)
        yield rank0
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        explorer.stop()


async def length(completion: str, task: Task) -> float:
    return float(len(completion))


def group(tokens: int, kept: tuple[Part, ...] = ()) -> Explore:
    return Explore(1, KEY, 1, Task("1 + 1 =", id="t"), (7, 8), Sampling(tokens, 1.0), kept)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is told of everything, several times a second."""
    monkeypatch.setattr(worker, "_LONG_S", 0.0)
    monkeypatch.setattr(worker, "_REPORT_S", 0.02)


def versions(experience: Experience) -> Counter[int]:
    return Counter(experience.turns[0].versions.tolist())


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("first", "then"), [(4, 4), (4, 6), (4, 3)])
def test_an_explorer_goes_on_from_the_tokens_of_a_dead_one(tiny_model_path: Path, first: int, then: int) -> None:
    async def run() -> tuple[Partials, Counting, Explored, Explored]:
        slow = Counting(first, tokens_per_second=400.0)
        async with exploring(tiny_model_path, slow) as rank0:
            rank0.inbox.put_nowait(group(300))
            for _ in range(3):
                await rank0.heard(Sampled)
        kept = rank0.kept
        engine = Counting(then)
        async with exploring(tiny_model_path, engine) as rank0:
            rank0.inbox.put_nowait(group(300, kept.of(KEY)))
            explored = await rank0.heard(Explored)
        async with exploring(tiny_model_path, Counting(then)) as rank0:
            rank0.inbox.put_nowait(group(300))
            undisturbed = await rank0.heard(Explored)
        return kept, engine, explored, undisturbed

    kept, engine, explored, undisturbed = asyncio.run(run())
    had = [part.tokens.num_tokens for part in kept.of(KEY)]
    assert len(had) == 2 and min(had) > 0 and max(had) < 300
    usable = sum(had) if then >= first else 0
    assert engine.tokens == 600 - usable
    for experience, whole in zip(explored.experiences, undisturbed.experiences, strict=True):
        turn, expected = experience.turns[0], whole.turns[0]
        assert (turn.token_ids == expected.token_ids).all() and (turn.logprobs == expected.logprobs).all()
        assert turn.finish_reason == "length"
        number = had[experience.sample] if then >= first else 0
        assert versions(experience) == Counter({first: number}) + Counter({then: 300 - number})


@pytest.mark.usefixtures("soon")
def test_calls_that_were_answered_are_not_sampled_again(tiny_model_path: Path) -> None:
    """Of an agent that calls twice, one sample is in its second call, and one has not begun with it."""
    held: list[asyncio.Event] = []

    async def workflow(task: Task, policy: Policy) -> str:
        draft = await policy(task.prompt, max_new_tokens=40)
        if policy._seed == 8 and held:
            await held[0].wait()
        return await policy(f"{task.prompt}{draft}\nBetter:", max_new_tokens=200)

    async def run() -> tuple[Partials, Counting, Explored, Explored]:
        held.append(asyncio.Event())
        async with exploring(tiny_model_path, Counting(2, tokens_per_second=400.0), workflow=workflow) as rank0:
            rank0.inbox.put_nowait(group(200))
            while sorted(bool(part.tokens.finish_reason) for part in rank0.kept.of(KEY)) != [False, True, True]:
                await rank0.heard(Sampled)
        kept = rank0.kept
        held.clear()
        engine = Counting(2)
        async with exploring(tiny_model_path, engine, workflow=workflow) as rank0:
            rank0.inbox.put_nowait(group(200, kept.of(KEY)))
            explored = await rank0.heard(Explored)
        async with exploring(tiny_model_path, Counting(2), workflow=workflow) as rank0:
            rank0.inbox.put_nowait(group(200))
            undisturbed = await rank0.heard(Explored)
        return kept, engine, explored, undisturbed

    kept, engine, explored, undisturbed = asyncio.run(run())
    assert not explored.failures
    assert engine.tokens == 2 * 240 - sum(part.tokens.num_tokens for part in kept.of(KEY)) < 400
    for experience, whole in zip(explored.experiences, undisturbed.experiences, strict=True):
        assert [turn.num_tokens for turn in experience.turns] == [40, 200]
        assert experience.turns == whole.turns


@pytest.mark.usefixtures("soon")
def test_a_sample_that_is_tried_again_begins_anew(tiny_model_path: Path) -> None:
    """What rank 0 has of the first try does not get into the second."""
    tries = Counter[int]()
    go = asyncio.Event()

    async def workflow(task: Task, policy: Policy) -> str:
        tries[policy._seed] += 1
        text = await policy(task.prompt)
        if tries[policy._seed] == 1:
            await go.wait()
            raise LookupError("the first")
        return text

    async def run() -> tuple[Rank0, Explored]:
        engine = Counting(0, tokens_per_second=400.0)
        async with exploring(tiny_model_path, engine, workflow=workflow, tolerance=Tolerance(retries=1)) as rank0:
            rank0.inbox.put_nowait(group(60))
            while [part.tokens.finish_reason for part in rank0.kept.of(KEY)] != ["length", "length"]:
                await rank0.heard(Sampled)
            engine.version = 1
            go.set()
            return rank0, await rank0.heard(Explored)

    rank0, explored = asyncio.run(run())
    assert not explored.failures and explored.retried == 2
    for experience in explored.experiences:
        assert versions(experience) == Counter({1: 60})
    for part in rank0.kept.of(KEY):  # as far as it was told: of either try, and whole
        assert len(set(part.tokens.versions.tolist())) == 1


def test_a_group_that_is_soon_done_and_validation_are_not_told_of(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_REPORT_S", 0.02)

    async def run(asked: Explore, long_s: float) -> Rank0:
        monkeypatch.setattr(worker, "_LONG_S", long_s)
        async with exploring(tiny_model_path, Counting(0, tokens_per_second=400.0)) as rank0:
            rank0.inbox.put_nowait(asked)
            await rank0.heard(Explored)
        return rank0

    for asked, long_s in ((group(40), 60.0), (replace(group(40), key=GroupKey(-1, 0)), 0.0)):
        rank0 = asyncio.run(run(asked, long_s))
        assert KEY not in rank0.kept and GroupKey(-1, 0) not in rank0.kept
    assert KEY in asyncio.run(run(group(40), 0.0)).kept


# What limits a sample


@pytest.mark.parametrize("long", [True, False])
def test_a_sample_whose_time_is_over_ends_as_length(tiny_model_path: Path, long: bool) -> None:
    calls: list[int] = []

    async def agent(task: Task, policy: Policy) -> str:
        while True:
            calls.append(policy._seed)
            await policy("again")

    engine = Counting(0, tokens_per_second=100.0)

    async def run() -> Explored:
        timeouts = Timeouts(sample_s=0.5)
        workflow: Callable[..., Any] = SingleTurn() if long else agent
        async with exploring(tiny_model_path, engine, workflow=workflow, timeouts=timeouts) as rank0:
            rank0.inbox.put_nowait(group(900 if long else 10))
            answer: Explored = await rank0.heard(Explored)
            return answer

    explored = asyncio.run(run())
    assert not explored.failures and explored.retried == 0
    for experience in explored.experiences:
        assert experience.turns[-1].finish_reason == "length"
        assert len(experience.turns) == 1 if long else len(experience.turns) > 2
        assert 10 <= experience.num_tokens < 80
    assert engine.tokens < 160


def test_who_waits_for_a_users_function_makes_progress_and_an_engine_that_hangs_does_not(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_REPORT_S", 0.02)
    hanging, go = threading.Event(), threading.Event()

    class Hanging(Counting):
        def step(self) -> list[Completion]:
            hanging.set()
            assert go.wait(DEADLINE_S)
            return super().step()

    async def run() -> list[Any]:
        called = asyncio.Event()

        async def workflow(task: Task, policy: Policy) -> str:
            await called.wait()
            return await policy(task.prompt)

        async with exploring(tiny_model_path, Hanging(0), workflow=workflow) as rank0:
            rank0.inbox.put_nowait(group(5))
            for _ in range(3):
                await rank0.heard(Advanced)
            called.set()
            assert await asyncio.to_thread(hanging.wait, DEADLINE_S)
            while not rank0.messages.empty():
                rank0.messages.get_nowait()
            await asyncio.sleep(0.2)  # ten reports that are not made
            silent = [rank0.messages.get_nowait() for _ in range(rank0.messages.qsize())]
            go.set()
            await rank0.heard(Explored)
        return silent

    assert asyncio.run(run()) == []
