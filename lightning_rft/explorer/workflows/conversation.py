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
    said: list[Said] = field(default_factory=list)  # the messages as they are compared
    opening: str = ""  # the beginning of the answer; of a prompt that is text, all of it
    packed_ids: bytes = b""  # of the prompt
    reply: Reply | None = None


@dataclass
class _Place:
    """A point that conversations pass through: after a message, which later calls share if they spell it alike."""

    message: dict[str, Any] = field(default_factory=dict)
    said: Said | None = None
    after: dict[Hashable, _Place] = field(default_factory=dict)  # by the next message's key
    calls: list[Call] = field(default_factory=list)  # whose answer comes next


class _Found(NamedTuple):
    """What a prompt takes from an earlier call."""

    ids: Sequence[int] | None  # of the prompt; None: the chat template does not tell those that come after the answer
    exact: bool  # whether it extends the call's prompt and answer, spelled as they were


class Conversations:
    """The calls of a sample, in the order in which they were made.

    ``encoded`` holds prompts that go on from no earlier call, which the samples of a group share.
    """

    def __init__(self, tokenizer: Any, encoded: Encoded) -> None:
        self.calls: list[Call] = []
        self.drift = 0  # prompts that have an earlier answer in them, but do not extend it exactly
        self._tokenizer = tokenizer
        self._encoded = encoded
        self._begin: dict[str, _Place] = {}  # by tools and variables of the template; all texts have one

    def ask(self, prompt: Any, template: _Template, tools: _Tools) -> tuple[Call, tuple[int, ...]]:
        """A new call, and the ids of its prompt."""
        call = Call()
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Integral):
            ids = self._checked(prompt)
            call.packed_ids = array("i", ids).tobytes()
        else:
            check_prompt(prompt)
            ids = self._of_words(call, prompt, template, tools)
        if tools and call.messages is None:
            raise ConfigurationError("tools are for chat messages: the chat template tells the model of them")
        self.calls.append(call)
        return call, ids

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

    def _of_words(self, call: Call, prompt: Any, template: _Template, tools: _Tools) -> tuple[int, ...]:
        if isinstance(prompt, str):
            call.opening, passed = str(prompt), [self._begin.setdefault("", _Place())]
        else:
            passed = self._walk(call, [plain_message(message) for message in prompt], by_value([template, tools]))
        found = self._continued(call, passed[-1]) or self._followed(call, passed, prompt, template, tools)
        passed[-1].calls.append(call)
        self.drift += found is not None and not found.exact
        if found is not None and found.ids is not None:
            ids = tuple(found.ids)
            call.packed_ids = array("i", ids).tobytes()
            return ids
        key = by_value([call.messages, call.opening, template, tools])
        if key not in self._encoded:
            ids = encode_prompt(self._tokenizer, prompt, template, tools)
            self._encoded[key] = ids, array("i", ids).tobytes()
        ids, call.packed_ids = self._encoded[key]
        return ids

    def _walk(self, call: Call, messages: list[dict[str, Any]], variant: str) -> list[_Place]:
        """The places before each message, and after the last one."""
        if ends_open(messages):
            call.opening = messages.pop()["content"]
        call.messages = []
        passed = [self._begin.setdefault(variant, _Place())]
        for message in messages:
            one = said(message)
            place = passed[-1].after.setdefault(one.key, _Place(message, one))
            alike = place.said == one and place.message == message
            call.messages.append(place.message if alike else message)
            call.said.append(place.said if alike and place.said is not None else one)
            passed.append(place)
        return passed

    def _continued(self, call: Call, place: _Place) -> _Found | None:
        """The longest answer that a prompt goes on with in the middle of it."""
        longest, found = 0, None
        for earlier in place.calls:
            reply, begun = earlier.reply, len(earlier.opening)
            if reply is None or not call.opening.startswith(earlier.opening) or _contradict(earlier, call):
                continue
            for answer in (reply.raw_text, reply.whole_text):
                if not answer or begun + len(answer) <= longest or not call.opening.startswith(answer, begun):
                    continue
                longest = begun + len(answer)
                # A token that ended the answer, and that the prompt leaves out, is not in the middle of anything.
                ended = answer != reply.raw_text and reply.finish_reason == "stop" and self._is_special(reply.token_ids)
                rest = encode_later(self._tokenizer, call.opening[longest:])
                ids = (*_ids(earlier), *(reply.token_ids[:-1] if ended else reply.token_ids), *rest)
                found = _Found(ids, not ended and _spelled_alike(earlier.said, call.said))
        return found

    def _followed(
        self, call: Call, passed: Sequence[_Place], prompt: Any, template: _Template, tools: _Tools
    ) -> _Found | None:
        """The longest conversation that a prompt adds messages to."""
        for index in reversed(range(len(call.said))):
            likest: tuple[Call, Reply, bool] | None = None
            for earlier in passed[index].calls:
                if earlier.reply is None:
                    continue
                answer = said(plain_message(earlier.reply.message))
                if answer.key != call.said[index].key or answer.contradicts(call.said[index]):
                    continue
                exact = _spelled_alike([*earlier.said, answer], call.said)
                if not _contradict(earlier, call) and (likest is None or (exact and not likest[2])):
                    likest = earlier, earlier.reply, exact
            if likest is None:
                gone_on = self._gone_on(call, passed[index].calls, prompt, index, template, tools)
                if gone_on is not None:
                    return gone_on
                continue
            earlier, reply, exact = likest
            end = reply.token_ids[-1] if reply.token_ids and reply.finish_reason == "stop" else None
            rest = encode_after(self._tokenizer, prompt, index, template, tools, end=end)
            if rest is None:
                return _Found(None, exact=False)
            if end in rest:
                rest = self._unsaid(rest, reply.token_ids)
            return _Found((*_ids(earlier), *reply.token_ids, *rest), exact)
        return None

    def _gone_on(
        self, call: Call, calls: Sequence[Call], prompt: Any, index: int, template: _Template, tools: _Tools
    ) -> _Found | None:
        """The longest answer that a message goes on from, as agents do that add to what a text of ``stop`` ended."""
        content, longest, found = (call.messages or [])[index]["content"], 0, None
        for earlier in calls:
            reply = earlier.reply
            if reply is None or not reply.whole_text or self._is_special(reply.token_ids) or _contradict(earlier, call):
                continue
            begun = earlier.opening + reply.whole_text
            if len(begun) <= longest or not content.startswith(begun):
                continue
            rest = encode_after(self._tokenizer, prompt, index, template, tools, more=content[len(begun) :])
            if rest is not None:
                longest = len(begun)
                found = _Found((*_ids(earlier), *reply.token_ids, *rest), _spelled_alike(earlier.said, call.said))
        return found

    def _unsaid(self, rest: list[int], token_ids: tuple[int, ...]) -> list[int]:
        """What comes after an answer, without the end of a turn that the answer has itself."""
        for overlap in range(min(len(token_ids), len(rest)), 0, -1):
            if rest[overlap - 1] == token_ids[-1] and tuple(rest[:overlap]) == token_ids[-overlap:]:
                return rest[overlap:]
        # some templates put white space before the end of a turn
        end = rest.index(token_ids[-1])
        blank = not self._tokenizer.decode(rest[:end], skip_special_tokens=False).strip()
        return rest[end + 1 :] if blank else rest

    def _is_special(self, token_ids: tuple[int, ...]) -> bool:
        """Whether the last token has no text."""
        return not self._tokenizer.decode(token_ids[-1:], skip_special_tokens=True)


def _ids(call: Call) -> array[int]:
    ids = array("i")
    ids.frombytes(call.packed_ids)
    return ids


def _contradict(earlier: Call, call: Call) -> bool:
    return any(one.contradicts(other) for one, other in zip(earlier.said, call.said, strict=False))


def _spelled_alike(some: Sequence[Said], others: Sequence[Said]) -> bool:
    """Whether the messages of two conversations, as far as both have some, are spelled alike."""
    return all(one.spelling == other.spelling for one, other in zip(some, others, strict=False))
