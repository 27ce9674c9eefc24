"""Append-only conversations: a prompt keeps the ids of the earlier call that it goes on from, and encodes the rest."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.workflows.messages import Said, by_value, said
from lightning_rft.tasks.prompts import (
    check_prompt,
    encode_after,
    encode_later,
    encode_prompt,
    ends_open,
    plain_message,
)

if TYPE_CHECKING:
    from lightning_rft.explorer.workflows.reply import Reply

__all__ = ["Call", "Conversations", "Encoded"]

Encoded = dict[str, tuple[tuple[int, ...], bytes]]  # a prompt as JSON to its token ids, as such and packed
_Tools = Sequence[Mapping[str, Any]] | None
_Template = Mapping[str, Any] | None


@dataclass(eq=False)
class Call:
    """One call of the policy."""

    messages: list[dict[str, Any]] | None = None  # without a beginning of the answer; None for text and token ids
    opening: str = ""  # the beginning of the answer; of a prompt that is text, all of it
    said: tuple[Said, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    packed_ids: bytes = b""
    reply: Reply | None = None


@dataclass
class _Place:
    """A point that conversations pass through."""

    calls: list[Call] = field(default_factory=list)  # those whose answer comes next
    after: dict[Hashable, _Place] = field(default_factory=dict)  # by the next message's key


class _Found(NamedTuple):
    """An earlier call that a prompt goes on from."""

    ids: Sequence[int] | None  # of the prompt; None: the chat template does not tell those that come after the answer
    exact: bool  # whether the prompt extends the call's prompt and answer, as they were spelled


class Conversations:
    """The calls of a sample, in the order in which they were made.

    ``encoded`` holds prompts that go on from no earlier call, which the samples of a group share.
    """

    def __init__(self, tokenizer: Any, encoded: Encoded) -> None:
        self.calls: list[Call] = []
        self.drift = 0  # prompts that only nearly extend an earlier call
        self._tokenizer = tokenizer
        self._encoded = encoded
        self._begin: dict[str, _Place] = {}  # by tools and variables of the template; all texts have one

    def ask(self, prompt: Any, template: _Template, tools: _Tools) -> Call:
        """A new call, with the ids of its prompt."""
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Integral):
            ids = self._checked(prompt)
            call = Call(prompt_ids=ids, packed_ids=array("i", ids).tobytes())
        else:
            check_prompt(prompt)
            call = self._of_words(prompt, template, tools)
        if tools and call.messages is None:
            raise ConfigurationError("tools are for chat messages: the chat template tells the model of them")
        self.calls.append(call)
        return call

    def _checked(self, prompt: Sequence[int]) -> tuple[int, ...]:
        try:
            ids = tuple(array("i", prompt))
        except (TypeError, OverflowError) as error:
            raise ConfigurationError(f"a prompt of token ids takes whole numbers: {error}") from error
        known = len(self._tokenizer)
        if not all(0 <= token < known for token in (min(ids), max(ids))):
            # a model may have, and sample, more ids than its tokenizer
            sampled = {token for call in self.calls if call.reply is not None for token in call.reply.token_ids}
            unknown = [token for token in ids if not 0 <= token < known and token not in sampled]
            if unknown:
                raise ConfigurationError(f"the prompt has token id {unknown[0]}, but the tokenizer has {known} tokens")
        return ids

    def _of_words(self, prompt: Any, template: _Template, tools: _Tools) -> Call:
        call = Call()
        if isinstance(prompt, str):
            call.opening, variant = str(prompt), ""
        else:
            whole = [plain_message(message) for message in prompt]
            call.messages = whole[:-1] if ends_open(whole) else whole
            call.opening = whole[-1]["content"] if ends_open(whole) else ""
            call.said, variant = tuple(map(said, call.messages)), by_value([template, tools])
        passed = [self._begin.setdefault(variant, _Place())]
        for one in call.said:
            passed.append(passed[-1].after.setdefault(one.key, _Place()))
        found = self._continued(call, passed[-1]) or self._followed(call, passed, prompt, template, tools)
        if found is not None and not (found.exact and found.ids is not None):
            self.drift += 1
        if found is not None and found.ids is not None:
            call.prompt_ids = tuple(found.ids)
            call.packed_ids = array("i", call.prompt_ids).tobytes()
        else:
            key = by_value([call.messages, call.opening, template, tools])
            if key not in self._encoded:
                ids = encode_prompt(self._tokenizer, prompt, template, tools)
                self._encoded[key] = ids, array("i", ids).tobytes()
            call.prompt_ids, call.packed_ids = self._encoded[key]
        passed[-1].calls.append(call)
        return call

    def _continued(self, call: Call, place: _Place) -> _Found | None:
        """The longest answer that a prompt goes on with in mid-answer."""
        longest, found = 0, None
        for earlier in place.calls:
            if earlier.reply is None or not call.opening.startswith(earlier.opening) or _contradict(earlier, call):
                continue
            token_ids = earlier.reply.token_ids
            for plainly in (False, True):
                answer = self._tokenizer.decode(token_ids, skip_special_tokens=plainly)
                length = len(earlier.opening) + len(answer)
                if not answer or length <= longest or not call.opening.startswith(answer, len(earlier.opening)):
                    continue
                longest = length
                # A token that ended the answer, and that the prompt leaves out, is no part of what goes on.
                ended = plainly and earlier.reply.finish_reason == "stop" and self._says_nothing(token_ids[-1])
                rest = encode_later(self._tokenizer, call.opening[length:])
                ids = (*earlier.prompt_ids, *(token_ids[:-1] if ended else token_ids), *rest)
                found = _Found(ids, not ended and _same(earlier.said, call.said))
        return found

    def _followed(
        self, call: Call, passed: Sequence[_Place], prompt: Any, template: _Template, tools: _Tools
    ) -> _Found | None:
        """The longest conversation that a prompt adds messages to."""
        for index in reversed(range(len(call.said))):
            closest: Call | None = None
            exact = False
            for earlier in passed[index].calls:
                if earlier.reply is None or exact:
                    continue
                answer = said(earlier.reply.message)
                if answer.key != call.said[index].key or answer.contradicts(call.said[index]):
                    continue
                if _contradict(earlier, call):
                    continue
                exact = _same((*earlier.said, answer), call.said)
                if exact or closest is None:
                    closest = earlier
            if closest is not None and closest.reply is not None:
                rest = encode_after(self._tokenizer, prompt, index, template, tools)
                if rest is None:
                    return _Found(None, False)
                rest = self._unsaid(rest, closest.reply)
                return _Found((*closest.prompt_ids, *closest.reply.token_ids, *rest), exact)
        return None

    def _unsaid(self, rest: Sequence[int], reply: Reply) -> Sequence[int]:
        """What comes after an answer, without what the answer ended with itself."""
        token_ids = reply.token_ids
        if reply.finish_reason != "stop" or token_ids[-1] not in rest:
            return rest
        for overlap in range(min(len(token_ids), len(rest)), 0, -1):
            if rest[overlap - 1] == token_ids[-1] and tuple(rest[:overlap]) == token_ids[-overlap:]:
                return rest[overlap:]
        # some templates put white space before the end of a turn
        end = rest.index(token_ids[-1])
        blank = not self._tokenizer.decode(rest[:end], skip_special_tokens=False).strip()
        return rest[end + 1 :] if blank else rest

    def _says_nothing(self, token_id: int) -> bool:
        return not self._tokenizer.decode([token_id], skip_special_tokens=True)


def _contradict(earlier: Call, call: Call) -> bool:
    return any(one.contradicts(other) for one, other in zip(earlier.said, call.said, strict=False))


def _same(some: Sequence[Said], others: Sequence[Said]) -> bool:
    """Whether messages are spelled alike, as far as there are some."""
    return all(one.spelling == other.spelling for one, other in zip(some, others, strict=False))
