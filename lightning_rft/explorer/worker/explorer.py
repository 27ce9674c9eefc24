"""The explorer: it runs the groups it is given on one engine, and loads weights when told."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

from lightning_rft.channel import Failure, unpack
from lightning_rft.errors import ConfigurationError, LinkError
from lightning_rft.experience import Experience, GroupKey, Task, Turn
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.messages import (
    Advanced,
    Cancel,
    Connect,
    Ended,
    Explore,
    Explored,
    Load,
    Loaded,
    LoadFailed,
    Sampled,
    Scored,
    Several,
    Sleep,
    Slept,
    Started,
    Wake,
    Woken,
)
from lightning_rft.explorer.spec import ExplorerSpec
from lightning_rft.explorer.worker.answering import ask
from lightning_rft.explorer.worker.calls import Call, go_on, news
from lightning_rft.explorer.worker.endpoint import Endpoints
from lightning_rft.explorer.worker.scorer import Scorer
from lightning_rft.explorer.worker.stepper import Stepper
from lightning_rft.explorer.worker.together import Together
from lightning_rft.explorer.worker.users_code import as_exception, note_tasks
from lightning_rft.explorer.workflows.policy import Encoded, Policy
from lightning_rft.pickling import dumps
from lightning_rft.reward_calls import Answered
from lightning_rft.scores import Sample, Score

__all__ = ["Explorer", "next_message"]

_REPORT_S = 1.0
_LONG_S = 2.0  # from which on a group's tokens are worth keeping


class _Sends(Protocol):
    def send(self, message: Any) -> None: ...


@dataclass
class _Group:
    """A group that runs."""

    asked: Explore
    together: Together
    began: float
    encoded: Encoded = field(default_factory=dict)  # prompts, which its samples share
    ended: set[int] = field(default_factory=set)  # samples that rank 0 is told of, or about to be
    calls: dict[str, Call] = field(default_factory=dict)  # of which rank 0 is told if the group takes long
    retried: int = 0

    @cached_property
    def task(self) -> bytes:
        """The task, pickled: each sample rebuilds a copy of its own, which it may change."""
        return dumps(self.asked.task)

    @cached_property
    def kept(self) -> dict[tuple[int, bytes], Turn]:
        """What an explorer that died had sampled, by sample and fingerprint of the call."""
        return {(part.sample, part.call): part.tokens for part in self.asked.kept}


class Explorer:
    """Runs groups on one engine.

    Args:
        outbox: Sends messages to rank 0.
        spec: What to run.
    """

    def __init__(self, outbox: _Sends, spec: ExplorerSpec) -> None:
        loop = asyncio.get_running_loop()
        note_tasks(loop)
        self._outbox = outbox
        self._spec = spec
        self._max_model_len = spec.max_model_len
        self._stepper = Stepper(spec.engine, loop)
        self._endpoints = Endpoints()
        self._scorer = Scorer(spec.reward or _no_reward, spec.timeouts.reward_s)
        self._ended: dict[int, Counter[tuple[GroupKey, int]]] = {}  # of each run; rank 0 is about to be told
        self._work: dict[asyncio.Task[None], _Group] = {}  # that runs
        self._inbox: asyncio.Queue[Any]
        self._room = asyncio.Semaphore(1)  # once the engine is up, for as many samples as it takes at the same time
        self._tokenizer: Any = None

    async def serve(self, inbox: asyncio.Queue[Any]) -> None:
        """Starts the engine, then does what is asked until the process is told to end."""
        self._inbox, spec = inbox, self._spec
        await self._stepper.call(spec.engine.start, spec.model, max_model_len=spec.max_model_len, seed=spec.seed)
        self._max_model_len = min(spec.max_model_len, spec.engine.max_model_len or spec.max_model_len)
        # After the engine, not beside it: two threads that import transformers at once may each see half of it.
        self._tokenizer = await asyncio.to_thread(spec.model.tokenizer)
        gc.freeze()  # what was imported and loaded stays: never to be searched again
        gc.enable()
        engine = spec.engine
        started = Started(engine.dtype, engine.world_size, engine.nccl, engine.max_num_seqs, engine.ipc)
        self._room = asyncio.Semaphore(started.room)
        self._outbox.send(started)
        report = self._in_background(self._report())
        try:
            while (message := await next_message(inbox)) is not None:
                await self._handle(message)
        finally:
            report.cancel()

    def stop(self) -> None:
        """Ends the endpoint, the engine and the reward's process."""
        self._endpoints.stop()
        self._scorer.stop()
        self._stepper.stop(timeout_s=5)

    async def _report(self) -> None:
        """Tells rank 0 of progress, since that this process is alive says nothing about its engine, and of tokens."""
        before = 0
        while True:
            await asyncio.sleep(_REPORT_S)
            now = self._stepper.steps
            # Where the engine owes nothing, the work waits for functions of the user, each of which has a deadline.
            if now != before or (self._work and not self._stepper.owes):
                self._outbox.send(Advanced())
            before = now
            await self._tell_sampled()

    async def _tell_sampled(self) -> None:
        """Tells rank 0 what the groups that take long have sampled, for others to go on with if this process dies."""
        begun = asyncio.get_running_loop().time() - _LONG_S
        groups = {task: group for task, group in self._work.items() if group.began < begun and group.calls}
        told = {name: call.told for group in groups.values() for name, call in group.calls.items() if not call.done}
        running = await self._stepper.call(self._spec.engine.sampled, told) if told else ()
        sampled = {completion.request_id: completion for completion in running}
        for task, group in groups.items():
            if not task.done():  # else rank 0 has it all
                parts = tuple(news(group.calls, sampled))
                if parts:
                    self._outbox.send(Sampled(group.asked.run, group.asked.key, group.asked.attempt, parts))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs a part of the explorer, whose error ends it."""

        def ended(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None:
                self._inbox.put_nowait(as_exception(error, "an explorer"))

        task = asyncio.create_task(work)
        task.add_done_callback(ended)
        return task

    async def _handle(self, message: Any) -> None:
        if isinstance(message, Several):
            for one in message.messages:
                await self._handle(one)
        elif isinstance(message, Explore):
            together = Together(len(message.seeds), self._scorer.scores)
            group = _Group(message, together, asyncio.get_running_loop().time())
            task = self._in_background(self._explore(group))
            self._work[task] = group
            task.add_done_callback(self._work.pop)
        elif isinstance(message, Cancel):
            for task, group in list(self._work.items()):
                if group.asked.run == message.run and message.key in (None, group.asked.key):
                    task.cancel()
        elif isinstance(message, Connect):
            with contextlib.suppress(LinkError):  # rank 0 was to be in the same group: it notices, and invites again
                await self._stepper.call(self._spec.engine.connect, message.link)
        elif isinstance(message, Load):
            try:
                await self._stepper.load(message.manifest, message.version)
            except LinkError as error:
                self._outbox.send(LoadFailed(message.version, Failure.of(error)))
            else:
                await self._stepper.call(self._spec.engine.wake)  # what still sleeps: scoring takes all
                self._outbox.send(Loaded(message.version))
                self._outbox.send(Scored(message.version, await self._score(message.text_ids)))
        elif isinstance(message, Sleep):
            await self._stepper.call(self._spec.engine.sleep, message.level)
            self._outbox.send(Slept())
        elif isinstance(message, Wake):
            await self._stepper.call(self._spec.engine.wake, message.parts)
            self._outbox.send(Woken(message.parts))

    async def _score(self, text_ids: tuple[int, ...]) -> tuple[float, ...]:
        engine, ids = self._spec.engine, text_ids[: self._max_model_len - 1]
        if not engine.computes or len(ids) < 2:
            return ()
        return tuple(await self._stepper.call(engine.prompt_logprobs, ids))

    async def _explore(self, group: _Group) -> None:
        request = group.asked
        samples = [asyncio.ensure_future(self._sample(group, index)) for index in range(len(request.seeds))]
        for sample in samples:
            sample.add_done_callback(lambda _: group.together.ended())
        try:
            results = await asyncio.gather(*samples, return_exceptions=True)
        finally:
            for sample in samples:
                sample.cancel()
            group.together.stop()
        engine_error = self._stepper.error
        if engine_error is not None:  # no sample's fault: this process is of no use any more
            raise engine_error
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Exception):
                raise result
        experiences = tuple(result for result in results if isinstance(result, Experience))
        # a user's reward or workflow: it goes to rank 0, this process lives on
        failures = tuple(Failure.of(result) for result in results if isinstance(result, Exception))
        self._outbox.send(
            Explored(request.run, request.key, request.attempt, request.task.id, experiences, failures, group.retried)
        )

    async def _sample(self, group: _Group, index: int) -> Experience:
        attempt = 0
        while True:
            try:
                experience = await self._try(group, index, attempt)
            except Exception as error:
                attempt += 1
                permanent = isinstance(error, ConfigurationError)  # trying again changes nothing
                if permanent or attempt > self._spec.tolerance.retries or self._stepper.error is not None:
                    self._end(group, index)
                    raise
                group.retried += 1
                group.calls = {name: call for name, call in group.calls.items() if call.sample != index}
            else:
                self._end(group, index)
                return experience

    def _end(self, group: _Group, index: int) -> None:
        """Tells rank 0 that a sample needs the engine no more, together with all others that end now."""
        if index in group.ended or self._stepper.error is not None:
            return
        group.ended.add(index)
        if not self._ended:
            asyncio.get_running_loop().call_soon(self._tell_ended)
        asked = group.asked
        self._ended.setdefault(asked.run, Counter())[asked.key, asked.attempt] += 1

    def _tell_ended(self) -> None:
        ended, self._ended = self._ended, {}
        for run, samples in ended.items():
            self._outbox.send(Ended(run, dict(samples)))

    async def _try(self, group: _Group, index: int, attempt: int) -> Experience:
        spec, request = self._spec, group.asked
        task: Task = pickle.loads(group.task)
        trained = request.key.batch >= 0  # validation's groups are of no batch
        policy = Policy(
            partial(self._call, group, index) if trained else self._stepper.sample,
            self._tokenizer,
            name=f"{request.run}/{request.key.batch}/{request.key.slot}/{request.attempt}/{index}/{attempt}",
            sampling=request.sampling,
            max_model_len=self._max_model_len,
            seed=request.seeds[index],
            encoded=group.encoded,
            trained=trained,
            serve=self._endpoints.open,
            cut=self._stepper.cut,
        )
        async with self._room:  # validation asks for all at once, and a sample's clock starts when its turn comes
            answer = await ask(spec.workflow, task, policy, spec.timeouts)
        loop, turns = asyncio.get_running_loop(), policy.turns
        began = loop.time()
        if self._scorer.scoring < spec.engine.max_num_seqs:  # else rewards are what is slow: sampling more helps nobody
            self._end(group, index)
        score = answer.score
        if score is None:
            wanted = self._scorer.reward.wants_sample
            texts = tuple(reply.raw_text for reply in policy.replies)
            sample = Sample(turns, texts, policy.messages) if wanted else None
            score = await self._score_answer(group, index, Answered(answer.text, task, sample))
        earned = score.reward + sum(turn.reward or 0.0 for turn in turns)
        return Experience(
            *(request.task.id, index, turns, earned, answer.text),
            generate_seconds=round(policy.seconds, 6),
            reward_seconds=round(loop.time() - max(began, group.together.began), 6),
            rewards=score.parts,
            metrics={**_measured(turns, policy), **answer.metrics},
        )

    async def _call(self, group: _Group, index: int, request: Request) -> Completion:
        """Has the engine answer a call of the policy, or what is left of it."""
        call = Call(index, request)
        if group.kept:
            go_on(call, group.kept, self._spec.engine.version)
        if call.done is None:
            group.calls[request.id] = call
            try:
                call.done = await self._stepper.sample(call.request)
            finally:
                if call.done is None:
                    group.calls.pop(request.id, None)
        return call.done

    async def _score_answer(self, group: _Group, index: int, answered: Answered) -> Score:
        if self._scorer.reward.batched:
            return await group.together.score(index, answered)
        return await self._scorer(*answered)


def _measured(turns: Sequence[Turn], policy: Policy) -> dict[str, float]:
    """Metrics of a sample that its workflow need not count itself."""
    measured = {name: float(count) for name, count in policy.counts.items()}
    if len(turns) > 1:
        measured["drift"] = float(policy.drift)
    rewards = [turn.reward for turn in turns if turn.reward is not None]
    return measured | ({"turn_rewards": sum(rewards)} if rewards else {})


async def _no_reward(completion: str, task: Task) -> float:
    raise ConfigurationError(
        f"the workflow answered task {task.id!r} without a reward, and there is none to ask: return "
        "Answer(text, reward=...), or set RFTDataModule(reward=...)"
    )


async def next_message(inbox: asyncio.Queue[Any]) -> Any:
    """The next message; raises what came in place of one."""
    message = await inbox.get()
    if isinstance(message, Exception):
        raise message
    # Here and not on the listener's thread: what a reward's module imports would be imported beside what the engine
    # needs, and two threads that import transformers at once may each see half of it.
    return unpack(message) if isinstance(message, bytes) else message
