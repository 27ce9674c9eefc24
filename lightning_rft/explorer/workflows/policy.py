"""The policy as a workflow sees it: a coroutine is given a task and calls the policy as often as it likes."""

from __future__ import annotations

import asyncio
import pickle
import time
from array import array
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import fields, replace
from itertools import count
from typing import Any, Protocol

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task, Turn
from lightning_rft.explorer.engines.engine import Completion, Request
from lightning_rft.explorer.engines.stops import stop_at
from lightning_rft.sampling import Sampling
from lightning_rft.tasks.prompts import Prompt, encode_prompt

__all__ = ["Encoded", "Policy", "Workflow"]

Encoded = dict[bytes, tuple[tuple[int, ...], bytes]]  # a pickled prompt to its token ids, as such and packed


class Policy:
    """What a workflow calls to have the current policy answer; it keeps every call as a turn.

    A workflow may make several calls at the same time; turns, and the random numbers of each, are in the order in which
    the calls were made. ``name`` begins the request ids, ``encoded`` holds prompts that the samples of a group share,
    ``trained`` says whether the turns are for training, which does not take every way of sampling.
    """

    def __init__(
        self,
        sample: Callable[[Request], Awaitable[Completion]],
        tokenizer: Any,
        *,
        name: str,
        sampling: Sampling,
        max_model_len: int,
        seed: int,
        encoded: Encoded | None = None,
        trained: bool = True,
    ) -> None:
        self.seconds = 0.0
        self._sample = sample
        self._tokenizer = tokenizer
        self._name = name
        self._sampling = sampling
        self._trained = trained
        self._max_model_len = max_model_len
        self._seed = seed
        self._encoded = {} if encoded is None else encoded
        self._calls = count()
        self._turns: dict[int, Turn] = {}
        self._asking: set[asyncio.Task[Any]] = set()
        self._closed = False

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The calls that were answered, in the order in which they were made."""
        return tuple(turn for _, turn in sorted(self._turns.items()))

    def __call__(self, prompt: Prompt, **sampling: Any) -> Coroutine[Any, Any, str]:
        r"""Samples an answer; to be awaited.

        Args:
            prompt: Plain text or chat messages, the whole conversation so far.
            **sampling: Settings of :class:`~lightning_rft.Sampling` for this call alone, all but ``seed``.

        Returns:
            The answer as text, special tokens left out; it ends before a text of ``stop``.

        Raises:
            ConfigurationError: It is no prompt, prompt and answer do not fit the model's context, or a setting is
                unknown, out of range, or not for training.

        Example::

            answer = await policy(prompt, max_new_tokens=64, stop=["\n\n"], temperature=0.7)
        """
        return self._answer(prompt, next(self._calls), sampling)

    def raw_text(self, turn: Turn) -> str:
        """A turn's answer as text, special tokens included."""
        text: str = self._tokenizer.decode(turn.token_ids.tolist(), skip_special_tokens=False)
        return text

    def close(self) -> None:
        """Ends the calls that still wait, which nobody asks for any more, and refuses others."""
        self._closed = True
        for task in self._asking:
            task.cancel()

    async def _answer(self, prompt: Prompt, call: int, changes: dict[str, Any]) -> str:
        if self._closed:
            raise ConfigurationError("the policy was called after the end of its sample: await every call")
        # a generator of its own for every turn, else a second turn would repeat the first one's draws
        sampling = replace(self._sampled(changes), seed=(self._seed + call * 7_919) % 2**31)
        prompt_ids, packed_ids = self._encode(prompt, sampling)
        if len(prompt_ids) + (sampling.max_new_tokens or 0) > self._max_model_len:
            raise ConfigurationError(
                f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={sampling.max_new_tokens} do not fit a "
                f"context of {self._max_model_len} tokens: shorten the prompt or lower max_new_tokens"
            )
        began = time.perf_counter()
        request = Request(f"{self._name}/{call}", prompt_ids, sampling)
        asking = asyncio.current_task()
        assert asking is not None
        self._asking.add(asking)
        try:
            done = await self._sample(request)
        finally:
            self._asking.discard(asking)
        self.seconds += time.perf_counter() - began
        self._turns[call] = Turn(
            packed_ids,  # the same object in all samples of a group, so that it travels once
            done.token_ids,
            done.logprobs,
            done.versions,
            done.finish_reason,
            temperature=sampling.temperature or 0.0,
            sampling=sampling.truncation,
            support=done.support,
        )
        text: str = self._tokenizer.decode(done.token_ids, skip_special_tokens=True)
        if sampling.stop and done.finish_reason == "stop":
            text = text[: stop_at(self._tokenizer, done.token_ids, sampling.stop)]
        return text

    def _sampled(self, changes: dict[str, Any]) -> Sampling:
        """How a call samples that names some settings."""
        if not changes:
            return self._sampling
        known = {field.name for field in fields(Sampling)} - {"seed"}
        if unknown := sorted(changes.keys() - known):
            raise ConfigurationError(
                f"policy(prompt, {unknown[0]}=...) is no setting of a call: it takes {', '.join(sorted(known))}"
            )
        sampling = Sampling(**changes).filled(self._sampling)
        if self._trained:
            sampling.check_trainable()
        return sampling

    def _encode(self, prompt: Prompt, sampling: Sampling) -> tuple[tuple[int, ...], bytes]:
        template = sampling.chat_template_kwargs
        key = pickle.dumps((prompt, template))  # by value: a workflow may go on to change its list of messages
        if key not in self._encoded:
            ids = encode_prompt(self._tokenizer, prompt, template)
            self._encoded[key] = ids, array("i", ids).tobytes()
        return self._encoded[key]


class Workflow(Protocol):
    r"""Any ``async`` callable of a task and a policy that returns the text to be scored.

    The task is the sample's own copy.

    Example::

        async def second_thoughts(task, policy):
            draft = await policy(task.prompt)
            return await policy(f"{task.prompt}\nDraft: {draft}\nBetter:")
    """

    async def __call__(self, task: Task, policy: Policy) -> str:
        """Answers a task."""
        ...
