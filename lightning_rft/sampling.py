"""How answers are sampled, and which ways of it training can account for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Truncation

__all__ = ["BAN", "MAX_SUPPORT", "Sampling"]

MAX_SUPPORT = 64  # tokens to choose from that are stored with a sampled token
BAN = -100.0  # a bias from which down a token is never sampled
_CONSTRAINTS = ("choice", "regex", "json", "grammar")
_OURS = {
    *("tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}


@dataclass(frozen=True, repr=False)
class Sampling:
    """How answers are sampled: in training, in validation, and under the same names in a call of the policy.

    What validation leaves out is as in training, and what a call leaves out as in whichever it is part of; 0 or an
    empty value turns a setting off there. In training, whatever keeps tokens from being sampled (``top_p``, ``min_p``,
    ``min_new_tokens``, ``structured``, a ban) needs a ``top_k`` of at most 64: the tokens to choose from are then
    stored with each token, and its log-probability is taken over them.

    Args:
        max_new_tokens: Maximum tokens per answer; left out, 256, and in validation as in training.
        temperature: Softmax temperature, 0 for greedy; left out, 1 in training, and in validation 0 for a
            single answer to a task and else as in training.
        seed: Seeds the order of the tasks and every sample; left out, that of ``seed_everything`` or else 0, and in
            validation as in training. A call has random numbers of its own, and takes no seed.
        top_k: Samples from this many of the most likely tokens; 0 for all.
        top_p: Samples from the most likely tokens up to this total probability, of those that ``top_k`` leaves; 1 for
            all.
        min_p: Samples from tokens that are at least this fraction as likely as the most likely one; 0 for all.
        stop: Texts that end an answer, whose text ends before them. Their tokens were sampled, and are trained.
        stop_token_ids: Token ids that end an answer, and are part of it, beside the model's own.
        min_new_tokens: Tokens that an answer has before it may end.
        logit_bias: Numbers that are added to logits, by token id; -100 or less bans a token.
        structured: What answers must look like, with vLLM: ``{"choice": [...]}``, ``{"regex": "..."}``, ``{"json":
            schema}`` (a mapping, or JSON) or ``{"grammar": "..."}`` (EBNF).
        chat_template_kwargs: Variables of the chat template, such as ``{"enable_thinking": False}``.

    Raises:
        ConfigurationError: A setting is out of range.

    Example:
        >>> Sampling(temperature=0.8, stop="Q:").filled(Sampling(max_new_tokens=256, temperature=1.0, seed=0))
        Sampling(max_new_tokens=256, temperature=0.8, seed=0, stop=('Q:',))
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: Sequence[str] | str | None = None
    stop_token_ids: Sequence[int] | None = None
    min_new_tokens: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    # Not Any: a parser of configs would make a boolean of "yes".
    structured: Mapping[str, str | Sequence[str] | Mapping[str, Any]] | None = field(default=None, hash=False)
    chat_template_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, (fits, words) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ConfigurationError(f"{name}={value!r} must be {words}")
        if self.max_new_tokens is not None and (self.min_new_tokens or 0) > self.max_new_tokens:
            raise ConfigurationError(
                f"min_new_tokens={self.min_new_tokens} must be at most max_new_tokens={self.max_new_tokens}"
            )

    def __repr__(self) -> str:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return f"Sampling({', '.join(f'{name}={value!r}' for name, value in named if value is not None)})"

    def filled(self, default: Sampling) -> Sampling:
        """These settings, with what is left out taken from ``default``."""
        missing = [field.name for field in fields(self) if getattr(self, field.name) is None]
        return replace(self, **{name: getattr(default, name) for name in missing})

    def for_training(self, max_new_tokens: int | None) -> Sampling:
        """Returns these settings as training takes them, where two arguments may both name ``max_new_tokens``."""
        if max_new_tokens is not None and self.max_new_tokens not in (None, max_new_tokens):
            raise ConfigurationError(
                f"max_new_tokens={max_new_tokens} and sampling=Sampling(max_new_tokens={self.max_new_tokens}): set one"
            )
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        return self.filled(Sampling(256 if max_new_tokens is None else max_new_tokens, 1.0, seed))

    def check_trainable(self) -> None:
        """Raises ConfigurationError if training could not tell how probable the sampled tokens were."""
        if self.temperature == 0:
            raise ConfigurationError(
                f"temperature={self.temperature} must be above 0 in training: greedy samples of a group are all equal"
            )
        if (self.top_k or 0) > MAX_SUPPORT:
            raise ConfigurationError(
                f"top_k={self.top_k} must be at most {MAX_SUPPORT} in training, where the tokens to choose from are "
                "stored with each token: lower it, or set 0 for all tokens"
            )
        if any(bias > BAN for bias in (self.logit_bias or {}).values()):
            raise ConfigurationError(
                f"logit_bias={self.logit_bias} moves probabilities by what no gradient accounts for: in training set "
                f"{BAN:g} or less, which bans a token, or leave it out"
            )
        removing = {
            "top_p": self.top_p not in (None, 1),
            **{name: bool(getattr(self, name)) for name in ("min_p", "min_new_tokens", "structured", "logit_bias")},
        }
        for name, removes in removing.items():
            if removes and not self.top_k:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} keeps tokens from being sampled, and in training a log-prob must "
                    f"be taken over those that were left: set top_k beside it, from 1 to {MAX_SUPPORT}"
                )

    @property
    def truncation(self) -> Truncation:
        """How the distribution is truncated; greedy sampling takes its most likely token whatever is cut off."""
        if self.temperature == 0:
            return Truncation()
        return Truncation(self.top_k or 0, 1.0 if self.top_p is None else self.top_p, self.min_p or 0.0)

    @property
    def keeps_support(self) -> bool:
        """Whether the tokens to choose from are stored with each sampled token."""
        return 0 < self.truncation.top_k <= MAX_SUPPORT


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def _is_constraint(structured: Mapping[str, Any]) -> bool:
    return len(structured) < 2 and all(
        name in _CONSTRAINTS and value and not (name == "choice" and isinstance(value, str))
        for name, value in structured.items()
    )


_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda count: _is_count(count, 1), "at least 1"),
    "temperature": (lambda temperature: temperature >= 0, "at least 0"),
    "top_k": (_is_count, "at least 0, which keeps all tokens"),
    "top_p": (lambda share: 0 < share <= 1, "above 0 and at most 1"),
    "min_p": (lambda share: 0 <= share <= 1, "from 0 to 1"),
    "stop": (lambda texts: all(isinstance(text, str) and text for text in texts), "texts, none of them empty"),
    "stop_token_ids": (lambda ids: all(map(_is_count, ids)), "token ids"),
    "min_new_tokens": (_is_count, "at least 0"),
    "logit_bias": (
        lambda biases: all(_is_count(token) and bias == bias for token, bias in biases.items()),
        "numbers by token id",
    ),
    "structured": (_is_constraint, f"one of {', '.join(_CONSTRAINTS)}, such as {{'choice': ['yes', 'no']}}"),
    "chat_template_kwargs": (lambda names: not _OURS & set(names), f"without {', '.join(sorted(_OURS))}"),
}
