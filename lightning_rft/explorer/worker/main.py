"""The explorer process: ``python -m lightning_rft.explorer.worker.main FD``.

It knows nothing of strategies: it runs the groups it is given and loads weights when told. When rank 0 is gone, it
kills its own process group.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from lightning_rft.channel import Channel, Failure, unpack
from lightning_rft.errors import ConfigurationError, DeadlineError, LinkError
from lightning_rft.experience import Experience, GroupKey, Task
from lightning_rft.explorer.messages import (
    Advanced,
    Cancel,
    Connect,
    Ended,
    Explore,
    Explored,
    Failed,
    Load,
    Loaded,
    LoadFailed,
    Prepare,
    Several,
    Started,
)
from lightning_rft.explorer.spec import ExplorerSpec
from lightning_rft.explorer.worker.scorer import Scorer
from lightning_rft.explorer.worker.stepper import Stepper
from lightning_rft.explorer.workflows.policy import Encoded, Policy
from lightning_rft.pickling import dumps

__all__ = ["Explorer"]

_ORPHAN_POLL_S = 1.0
_REPORT_S = 1.0
_END = dumps(None)


@dataclass
class _Group:
    """A group that runs."""

    asked: Explore
    encoded: Encoded = field(default_factory=dict)  # prompts, which its samples share
    ended: set[int] = field(default_factory=set)  # samples that rank 0 is told of, or about to be
    retried: int = 0


class Explorer:
    """Runs groups on one engine.

    Args:
        channel: The line to rank 0.
        spec: What to run.
    """

    def __init__(self, channel: Channel, spec: ExplorerSpec) -> None:
        self._channel = channel
        self._spec = spec
        self._stepper = Stepper(spec.engine, asyncio.get_running_loop())
        self._scorer = Scorer(spec.reward, spec.timeouts.reward_s)
        self._scored = 0
        self._scoring = 0
        self._ended: dict[int, Counter[tuple[GroupKey, int]]] = {}  # of each run; rank 0 is about to be told
        self._work: dict[asyncio.Task[None], Explore] = {}  # running groups
        self._tokenizer: Any = None

    async def serve(self, inbox: asyncio.Queue[Any]) -> None:
        """Starts the engine, then does what is asked until the process is told to end."""
        spec = self._spec
        await self._stepper.call(spec.engine.start, spec.model, max_model_len=spec.max_model_len, seed=spec.seed)
        # After the engine, not beside it: two threads that import transformers at once may each see half of it.
        self._tokenizer = await asyncio.to_thread(_tokenizer, spec.model)
        gc.freeze()  # what was imported and loaded stays: never to be searched again
        gc.enable()
        engine = spec.engine
        self._channel.send(Started(engine.dtype, engine.world_size, engine.nccl, engine.max_num_seqs))
        report = asyncio.create_task(self._report())
        try:
            while (message := await _next(inbox)) is not None:
                await self._handle(message, inbox)
        finally:
            report.cancel()

    def stop(self) -> None:
        """Ends the engine and the reward's process."""
        self._scorer.stop()
        self._stepper.stop(timeout_s=5)

    async def _report(self) -> None:
        """Tells when there was progress: that this process is alive says nothing about its engine."""
        before = (0, 0)
        while True:
            await asyncio.sleep(_REPORT_S)
            now = (self._stepper.steps, self._scored)
            if now != before:
                self._channel.send(Advanced())
            before = now

    async def _handle(self, message: Any, inbox: asyncio.Queue[Any]) -> None:
        if isinstance(message, Several):
            for one in message.messages:
                await self._handle(one, inbox)
        elif isinstance(message, Explore):
            task = asyncio.create_task(self._explore(message, inbox))
            self._work[task] = message
            task.add_done_callback(self._work.pop)
        elif isinstance(message, Cancel):
            for task, asked in list(self._work.items()):
                if asked.run == message.run and message.key in (None, asked.key):
                    task.cancel()
        elif isinstance(message, Connect):
            with contextlib.suppress(LinkError):  # rank 0 was to be in the same group: it notices, and invites again
                await self._stepper.call(self._spec.engine.connect, message.link)
        elif isinstance(message, Load):
            try:
                await self._stepper.load(message.manifest, message.version)
            except LinkError as error:
                self._channel.send(LoadFailed(message.version, Failure.of(error)))
            else:
                self._channel.send(Loaded(message.version))

    async def _explore(self, request: Explore, inbox: asyncio.Queue[Any]) -> None:
        group = _Group(request)
        samples = [asyncio.ensure_future(self._sample(group, index)) for index in range(len(request.seeds))]
        try:
            results = await asyncio.gather(*samples, return_exceptions=True)
        finally:
            for sample in samples:
                sample.cancel()
        engine_error = self._stepper.error
        if engine_error is not None:  # no sample's fault: this process is of no use any more
            inbox.put_nowait(engine_error)
            return
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Exception):
                raise result
        experiences = tuple(result for result in results if isinstance(result, Experience))
        # a user's reward or workflow: it goes to rank 0, this process lives on
        failures = tuple(Failure.of(result) for result in results if isinstance(result, Exception))
        self._channel.send(
            Explored(request.run, request.key, request.attempt, request.task.id, experiences, failures, group.retried)
        )

    async def _sample(self, group: _Group, index: int) -> Experience:
        attempt = 0
        while True:
            try:
                experience = await self._in_time(self._try(group, index, attempt), group.asked.task)
            except Exception as error:
                attempt += 1
                permanent = isinstance(error, ConfigurationError)  # trying again changes nothing
                if permanent or attempt > self._spec.tolerance.retries or self._stepper.error is not None:
                    self._end(group, index)
                    raise
                group.retried += 1
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
            self._channel.send(Ended(run, dict(samples)))

    async def _in_time(self, sample: Coroutine[Any, Any, Experience], task: Task) -> Experience:
        limit = self._spec.timeouts.sample_s
        # not wait_for: its TimeoutError could not be told from one that the workflow raised itself
        running = asyncio.ensure_future(sample)
        try:
            await asyncio.wait([running], timeout=limit)
            if running.done():
                return running.result()
        finally:
            running.cancel()
        raise DeadlineError(
            f"a sample of task {task.id!r} took longer than Timeouts(sample_s={limit:g}): make the workflow faster or "
            "raise the setting"
        )

    async def _try(self, group: _Group, index: int, attempt: int) -> Experience:
        spec, request, task = self._spec, group.asked, group.asked.task
        policy = Policy(
            self._stepper.sample,
            self._tokenizer,
            name=f"{request.run}/{request.key.batch}/{request.key.slot}/{request.attempt}/{index}/{attempt}",
            sampling=request.sampling,
            max_model_len=spec.max_model_len,
            seed=request.seeds[index],
            encoded=group.encoded,
        )
        loop = asyncio.get_running_loop()
        text = await spec.workflow(task, policy)
        if not policy.turns:
            raise ConfigurationError(
                f"the workflow answered task {task.id!r} without calling the policy: nothing to train"
            )
        began = loop.time()
        if self._scoring < spec.engine.max_num_seqs:  # else rewards are what is slow: sampling more helps nobody
            self._end(group, index)
        self._scoring += 1
        try:
            reward = await self._scorer(text, task)
        finally:
            self._scoring -= 1
        self._scored += 1
        return Experience(
            task.id, index, tuple(policy.turns), reward, text, round(policy.seconds, 6), round(loop.time() - began, 6)
        )


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _listen(channel: Channel, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Any]) -> None:
    """Feeds the inbox; the end of the line is the end of this process and everything it started."""
    parent = os.getppid()
    while True:
        try:
            packed = channel.receive_packed(_ORPHAN_POLL_S)
        except TimeoutError:
            # another process may have inherited rank 0's end, and then it never reads as closed
            if os.getppid() != parent:
                break
        except (EOFError, OSError):
            break
        else:
            loop.call_soon_threadsafe(inbox.put_nowait, packed)
            if packed == _END:
                return  # told to end: the main thread does
    os.killpg(0, signal.SIGKILL)


async def _next(inbox: asyncio.Queue[Any]) -> Any:
    message = await inbox.get()
    if isinstance(message, Exception):
        raise message
    # Here and not on the listener's thread: what a reward's module imports would be imported beside what the engine
    # needs, and two threads that import transformers at once may each see half of it.
    return unpack(message) if isinstance(message, bytes) else message


async def _main(channel: Channel) -> None:
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    threading.Thread(
        target=_listen, args=(channel, asyncio.get_running_loop(), inbox), name="listener", daemon=True
    ).start()
    explorer: Explorer | None = None
    try:
        message = await _next(inbox)
        if isinstance(message, Prepare):
            # on this, the main thread: nothing else is to be done yet, and the end of the line is the listener's
            message.engine.prepare()
            message = await _next(inbox)
        if message is not None:
            explorer = Explorer(channel, message)
            await explorer.serve(inbox)
    except Exception as error:
        # told before the engine leaves its weight transport, which rank 0 notices too, and which says much less
        with contextlib.suppress(OSError):
            channel.send(Failed(Failure.of(error)))
        raise
    finally:
        if explorer is not None:
            explorer.stop()


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to handle
    if os.getpgrp() != os.getpid():
        raise SystemExit("an explorer must lead its own process group: it is started by ExplorerPool, not by hand")
    gc.disable()  # imports make nothing but what stays; a fifth of the seconds until an engine is ready
    channel = Channel(int(sys.argv[1]))
    try:
        asyncio.run(_main(channel))
    except BaseException:
        traceback.print_exc()  # into the log; Python itself would print it too late
    finally:
        # Whatever an engine left behind (tensor-parallel workers, a hung reward) ends with this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
