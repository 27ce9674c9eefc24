"""The policy as a workflow sees it: a coroutine is given a task and calls the policy as often as it likes."""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields, replace
from hashlib import blake2b
from typing import Any, Protocol

from lightning_rft.errors import ConfigurationError, ContextFull
from lightning_rft.experience import Turn
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.engines.stops import stop_at
from lightning_rft.explorer.workflows.conversation import Call, Conversations, Encoded
from lightning_rft.explorer.workflows.endpoint import Endpoint
from lightning_rft.explorer.workflows.reply import Reply
from lightning_rft.sampling import Sampling
from lightning_rft.tasks.prompts import Prompt

__all__ = ["Encoded", "Policy", "Reply", "Workflow"]


class Policy:
    """What a workflow calls to have the current policy answer; it keeps every call as a turn.

    A prompt that goes on from an earlier call keeps the ids which that call was given and has sampled, and only what is
    new is encoded: chat messages that begin with the call's messages and its :attr:`Reply.message`, or text that begins
    with the call's text and its answer. So a conversation is one row of training. White space around a message and the
    spelling of a tool call's arguments make no difference. Any other prompt begins a row of its own.

    A workflow may make several calls at the same time. Turns are in the order in which the calls were made. The random
    numbers of a call follow from the sample's seed, the prompt, and how many calls had that prompt before, not from
    when it is made.

    ``name`` begins the request ids, ``encoded`` holds prompts that the samples of a group share, ``trained`` says
    whether the turns are for training, which does not take every way of sampling, ``serve`` opens a session of the
    policy on an endpoint, and ``cut`` ends requests early, by their ids.

    Attributes:
        counts: What its endpoint counted, by name, such as ``endpoint_retries``: metrics of the sample.
        drift: Number of prompts that an earlier answer is in, but that do not extend that call as it was: messages
            spelled in another way, a last token that the prompt leaves out, or a chat template that does not tell what
            comes after an answer, so that the whole prompt was encoded.
        max_model_len: Maximum tokens of prompt and answer together.
        seconds: Time that was spent in calls.

    Example::

        async def workflow(task, policy):
            messages = [*task.prompt]
            answer = await policy(messages, max_new_tokens=256)
            while (found := search(answer)) and answer.context_left > 512:
                messages += [answer.message, {"role": "user", "content": found}]
                answer = await policy(messages, max_new_tokens=256)
            return answer
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
        serve: Callable[..., Endpoint] | None = None,
        cut: Callable[[Sequence[str]], object] = lambda request_ids: None,
    ) -> None:
        self.seconds = 0.0
        self.counts: Counter[str] = Counter()
        self.max_model_len = max_model_len
        self._sample = sample
        self.tokenizer = tokenizer
        self._name = name
        self.sampling = sampling
        self._trained = trained
        self._seed = seed
        self._serve = serve
        self._cut = cut
        #: Set by the first call after :meth:`end_answers`: it will not be answered.
        self.over = asyncio.Event()
        self._conversations = Conversations(tokenizer, {} if encoded is None else encoded)
        self._sent: Counter[bytes] = Counter()  # requests, by their prompt's ids
        self._asking: dict[asyncio.Task[Any], str] = {}  # to the id of the request that it waits for
        self._answered_at = 0.0  # the last of them
        self._ending = False
        self._endings: list[Callable[[], None]] = []
        self._closed = False

    @property
    def drift(self) -> int:
        """Number of prompts that nearly extended an earlier call."""
        return self._conversations.drift

    @property
    def replies(self) -> tuple[Reply, ...]:
        """The answers, in the order in which the calls were made."""
        return tuple(reply for _, reply in self._answered)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The calls that were answered, in the order in which they were made, with parents and rewards."""
        turns: list[Turn] = []
        longest: list[tuple[int, int]] = []  # minus the length in bytes, and the index, of each of them
        for call, reply in self._answered:
            parent = next((index for _, index in longest if reply.turn.extends(turns[index])), None)
            insort(longest, (-len(call.packed_ids) - 4 * len(reply.token_ids), len(turns)))
            turns.append(reply.turn.placed(parent, reply.reward))
        return tuple(turns)

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The conversation of the last call with its answer; None if its prompt was no chat messages."""
        if not self._answered:
            return None
        call, reply = self._answered[-1]
        return None if call.messages is None else [*call.messages, reply.message]

    async def __call__(
        self, prompt: Prompt | Sequence[int], *, tools: Sequence[Mapping[str, Any]] | None = None, **sampling: Any
    ) -> Reply:
        r"""Samples an answer.

        Args:
            prompt: Plain text or chat messages, the whole conversation so far, or token ids, which are used as they
                are. A last message of the assistant is the beginning of the answer.
            tools: JSON schemas of tools, for the chat template.
            **sampling: Settings of :class:`~lightning_rft.Sampling` for this call alone, all but ``seed``.

        Returns:
            The answer as text, special tokens left out; it ends before a text of ``stop``.

        Raises:
            ContextFull: Prompt and ``max_new_tokens`` do not fit the engine's context. A workflow may catch it, and
                e.g. go on with a shorter prompt.
            ConfigurationError: It is no prompt, or a setting is unknown, out of range, or not for training.

        Example::

            answer = await policy(prompt, max_new_tokens=64, stop=["\n\n"], temperature=0.7)
        """
        if self._closed:
            raise ConfigurationError("the policy was called after the end of its sample: await every call")
        settings = self._sampled(sampling)
        call, prompt_ids = self._conversations.ask(prompt, settings.chat_template_kwargs, tools)
        context_left = self.max_model_len - len(prompt_ids)
        if (settings.max_new_tokens or 0) > context_left:
            raise ContextFull(
                f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={settings.max_new_tokens} do not fit a "
                f"context of {self.max_model_len} tokens: shorten the prompt or lower max_new_tokens"
            )
        if self._ending:
            self.over.set()
            await asyncio.Event().wait()  # for the sample's end: whoever caught an error might call again at once
        name, seed = self._own(call.packed_ids)
        settings = replace(settings, seed=seed)
        done = await self._ask(Request(f"{self._name}/{name}", prompt_ids, settings))
        turn = Turn(
            call.packed_ids,  # the same object in all samples of a group, so that it travels once
            done.token_ids,
            done.logprobs,
            done.versions,
            done.finish_reason,
            temperature=settings.temperature or 0.0,
            sampling=settings.truncation,
            support=done.support,
        )
        text: str = self.tokenizer.decode(done.token_ids, skip_special_tokens=True)
        if settings.stop and done.finish_reason == "stop":
            text = text[: stop_at(self.tokenizer, done.token_ids, settings.stop)]
        context_left -= len(done.token_ids)
        opening = "" if call.messages is None else call.opening
        call.reply = Reply(text, turn, done.token_ids, context_left, opening, self.tokenizer)
        return call.reply

    def endpoint(self, tool_parser: str | None = None, reasoning_parser: str | None = None) -> Endpoint:
        """Opens a session of this policy on the explorer's endpoint, for an agent that speaks OpenAI's protocol.

        Args:
            tool_parser: Name of vLLM's parser that finds tool calls in an answer.
            reasoning_parser: Name of vLLM's parser that finds reasoning in an answer.

        Returns:
            An :class:`~lightning_rft.Endpoint`, which ends with the sample.

        Raises:
            ConfigurationError: There is no server, as in a test that makes a policy by hand.
        """
        if self._serve is None:
            raise ConfigurationError("policy.endpoint() needs a server, which only an explorer has: none was given")
        if self._closed:
            raise ConfigurationError("policy.endpoint() was called after the end of its sample: await every call")
        return self._serve(self, tool_parser=tool_parser, reasoning_parser=reasoning_parser)

    def at_close(self, end: Callable[[], None]) -> None:
        """Has a function called when the sample ends."""
        self._endings.append(end)

    def progressed(self) -> float:
        """When a call was last being answered, on the clock of the event loop; 0 before the first."""
        return asyncio.get_running_loop().time() if self._asking else self._answered_at

    def end_answers(self) -> None:
        """Ends the answers that are being sampled, as ``length``; a later call ends the sample."""
        self._ending = True
        self._cut(list(self._asking.values()))

    def close(self) -> None:
        """Ends the calls that still wait, which nobody asks for any more, and refuses others."""
        self._closed = True
        for task in self._asking:
            task.cancel()
        while self._endings:
            self._endings.pop()()

    @property
    def _answered(self) -> list[tuple[Call, Reply]]:
        return [(call, call.reply) for call in self._conversations.calls if call.reply is not None]

    async def _ask(self, request: Request) -> Completion:
        began = time.perf_counter()
        asking = asyncio.current_task()
        assert asking is not None
        self._asking[asking] = request.id
        try:
            done = await self._sample(request)
        finally:
            del self._asking[asking]
            self._answered_at = asking.get_loop().time()
        self.seconds += time.perf_counter() - began
        return done

    def _own(self, packed_ids: bytes) -> tuple[str, int]:
        """Name and seed of a request, which depend on nothing that time decides."""
        first, nth = not self._sent, self._sent[packed_ids]
        self._sent[packed_ids] += 1
        if first:
            return "0", self._seed % 2**31
        digest = blake2b(f"{self._seed}/{nth}/".encode() + packed_ids, digest_size=8).digest()
        return digest.hex(), int.from_bytes(digest[:4]) % 2**31

    def _sampled(self, changes: dict[str, Any]) -> Sampling:
        """How a call samples that names some settings."""
        if not changes:
            return self.sampling
        known = {field.name for field in fields(Sampling)} - {"seed"}
        if unknown := sorted(changes.keys() - known):
            raise ConfigurationError(
                f"policy(prompt, {unknown[0]}=...) is no setting of a call: it takes {', '.join(sorted(known))}"
            )
        sampling = Sampling(**changes).filled(self.sampling)
        if self._trained:
            sampling.check_trainable()
        return sampling


class Workflow(Protocol):
    r"""Any ``async`` callable of a task and a policy that returns the text to be scored, or an :class:`Answer`.

    The task is the sample's own copy.

    Example::

        async def second_thoughts(task, policy):
            draft = await policy(task.prompt)
            return await policy(f"{task.prompt}\nDraft: {draft}\nBetter:")
    """

    async def __call__(self, task: Any, policy: Any) -> Any:  # a config takes functions whose hints equal these
        """Answers a task."""
        ...
