"""The policy as a workflow sees it: a coroutine is given a task and calls the policy as often as it likes."""

from __future__ import annotations

import pickle
import time
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task, Turn
from lightning_rft.explorer.engines.engine import Completion, Request
from lightning_rft.settings import Sampling

__all__ = ["Encoded", "Policy", "Prompt", "Workflow", "encode_prompt"]

Prompt = str | Sequence[Mapping[str, Any]]
Encoded = dict[bytes, tuple[tuple[int, ...], bytes]]  # a pickled prompt to its token ids, as such and packed


def encode_prompt(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt: plain text as it is, chat messages through the tokenizer's chat template."""
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt)["input_ids"])
    messages = [dict(message) for message in prompt]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


class Policy:
    """What a workflow calls to have the current policy answer; it keeps every call as a turn.

    Args:
        sample: Runs one request on the engine.
        tokenizer: A transformers tokenizer.
        name: Prefix of the request ids, unique among the samples that run at the same time.
        sampling: How every answer is sampled, with nothing left out.
        max_model_len: Maximum tokens of prompt and answer together.
        seed: Seed of this sample.
        encoded: Prompts that were encoded and packed before, to be shared by the samples of a group, which mostly have
            the same.
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
    ) -> None:
        self.turns: list[Turn] = []
        self.seconds = 0.0
        self._sample = sample
        self._tokenizer = tokenizer
        self._name = name
        assert sampling.max_new_tokens is not None and sampling.temperature is not None, "filled by the data module"
        self._max_new_tokens, self._temperature = sampling.max_new_tokens, sampling.temperature
        self._max_model_len = max_model_len
        self._seed = seed
        self._encoded = {} if encoded is None else encoded

    async def __call__(self, prompt: Prompt) -> str:
        """Samples an answer.

        Args:
            prompt: Plain text or chat messages, the whole conversation so far.

        Returns:
            The answer as text, special tokens left out.

        Raises:
            ConfigurationError: Prompt and answer do not fit the model's context.
        """
        prompt_ids, packed_ids = self._encode(prompt)
        if len(prompt_ids) + self._max_new_tokens > self._max_model_len:
            raise ConfigurationError(
                f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={self._max_new_tokens} do not fit a context "
                f"of {self._max_model_len} tokens: shorten the prompt or lower max_new_tokens"
            )
        began = time.perf_counter()
        turn = len(self.turns)
        # a generator of its own for every turn, else a second turn would repeat the first one's draws
        request = Request(
            f"{self._name}/{turn}",
            prompt_ids,
            self._max_new_tokens,
            self._temperature,
            (self._seed + turn * 7_919) % 2**31,
        )
        done = await self._sample(request)
        self.seconds += time.perf_counter() - began
        self.turns.append(
            Turn(
                packed_ids,  # the same object in all samples of a group, so that it travels once
                done.token_ids,
                done.logprobs,
                done.versions,
                done.finish_reason,
                temperature=request.temperature,
                sampling=request.sampling,
                support=done.support,
            )
        )
        text: str = self._tokenizer.decode(done.token_ids, skip_special_tokens=True)
        return text

    def _encode(self, prompt: Prompt) -> tuple[tuple[int, ...], bytes]:
        key = pickle.dumps(prompt)  # by value: a workflow may go on to change its list of messages
        if key not in self._encoded:
            ids = encode_prompt(self._tokenizer, prompt)
            self._encoded[key] = ids, array("i", ids).tobytes()
        return self._encoded[key]


class Workflow(Protocol):
    r"""Any ``async`` callable of a task and a policy that returns the text to be scored.

    Example::

        async def second_thoughts(task, policy):
            draft = await policy(task.prompt)
            return await policy(f"{task.prompt}\nDraft: {draft}\nBetter:")
    """

    async def __call__(self, task: Task, policy: Policy) -> str:
        """Answers a task."""
        ...
