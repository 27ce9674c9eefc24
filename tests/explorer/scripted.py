"""A policy whose answers are written beforehand, with everything else as in an explorer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.settings import Sampling

#: Qwen's and Hermes's way with tools, in the tokens of the tiny model.
TEMPLATE_WITH_TOOLS = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ 'user' if message['role'] == 'tool' else message['role'] }}|>"
    "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}<tool_call>"
    "{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}</tool_call>"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Script:
    """Gives the next of its answers, or asks a function for it; ends each with the end of a turn, unless cut off."""

    def __init__(self, tokenizer: Any, answers: Iterable[str] | Callable[[str], str], cut: bool = False) -> None:
        self._tokenizer = tokenizer
        left = iter(() if callable(answers) else answers)
        self._answers = answers if callable(answers) else lambda _: next(left)
        self._cut = cut
        self.prompts: list[str] = []

    async def __call__(self, request: Request) -> Completion:
        self.prompts.append(self._tokenizer.decode(request.prompt_ids))
        ids = self._tokenizer(self._answers(self.prompts[-1]), add_special_tokens=False)["input_ids"]
        ids = (*ids, *(() if self._cut else (self._tokenizer.eos_token_id,)))
        return Completion(request.id, ids, (-0.5,) * len(ids), (0,) * len(ids), "length" if self._cut else "stop")


def scripted_policy(tokenizer: Any, script: Script, max_model_len: int = 4000, max_new_tokens: int = 100) -> Policy:
    return Policy(
        script,
        tokenizer,
        name="run",
        sampling=Sampling(max_new_tokens=max_new_tokens, temperature=1.0),
        max_model_len=max_model_len,
        seed=0,
    )
