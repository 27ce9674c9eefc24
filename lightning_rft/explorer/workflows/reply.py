"""An answer of the policy, as a workflow sees it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from lightning_rft.turn import Turn

__all__ = ["Reply"]


class Reply(str):
    """An answer of the policy: its text, and what was sampled.

    A copy and a pickle of it are its text alone.

    Attributes:
        turn: The call as it is trained; ``policy.turns`` adds parent and reward.
        token_ids: Sampled token ids.
        context_left: Tokens that the engine's context has left after prompt and answer.
        message: The chat message that stands for the answer in later prompts, ``{"role": "assistant", "content": ...}``
            with the text, behind what the prompt began of it. May be set, to one with tool calls or reasoning.
        reward: Reward of this turn alone; may be set.

    Example::

        reply = await policy(messages)
        if reply.finish_reason == "length":
            reply.reward = -1.0
    """

    turn: Turn
    token_ids: tuple[int, ...]
    context_left: int
    message: dict[str, Any]
    reward: float | None
    _tokenizer: Any

    def __new__(
        cls, text: str, turn: Turn, token_ids: tuple[int, ...], context_left: int, opening: str, tokenizer: Any
    ) -> Reply:
        """Of the text that a workflow reads, what was sampled, and the beginning of the answer in the prompt."""
        self = super().__new__(cls, text)
        self.turn = turn
        self.token_ids = token_ids
        self.context_left = context_left
        self.message = {"role": "assistant", "content": opening + text}
        self.reward = None
        self._tokenizer = tokenizer
        return self

    @property
    def finish_reason(self) -> str:
        """``"stop"`` or ``"length"``, if ``max_new_tokens`` was reached."""
        return self.turn.finish_reason

    @cached_property
    def raw_text(self) -> str:
        """All that was sampled as text: special tokens, and a text of ``stop``."""
        text: str = self._tokenizer.decode(self.token_ids, skip_special_tokens=False)
        return text

    @cached_property
    def whole_text(self) -> str:
        """What was sampled as text, a text of ``stop`` included, special tokens left out."""
        text: str = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        return text

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Pickles and copies as text."""
        return str, (str(self),)
