"""A group of samples as text: what was read, sampled and earned, and what would be trained of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lightning_rft.experience import Experience, Group
from lightning_rft.monitor.texts import harmless, shortened
from lightning_rft.trainer.lines import find_lines
from lightning_rft.turn import Turn

__all__ = ["transcript"]

_MOST_CHARACTERS = 4000  # of what is read or sampled in one go
_MOST_IDS = 24

_RESET, _DIM, _BRIGHT, _TITLE = "\x1b[0m", "\x1b[2m", "\x1b[1;32m", "\x1b[1m"


def transcript(group: Group, tokenizer: Any, *, colour: bool) -> str:
    """All of a group.

    What the policy read is dim and what it sampled is bright, or without ``colour`` between ⟦ and ⟧.
    """
    page = _Page(tokenizer, colour)
    lines = [page.title(f"Task {group.task_id!r}, {_count(len(group.experiences), 'sample')}")]
    for experience in group.experiences:
        lines += ["", *page.sample(experience)]
    return "\n".join([*lines, "", *page.trained(group)])


class _Page:
    """How parts of a transcript look."""

    def __init__(self, tokenizer: Any, colour: bool) -> None:
        self._tokenizer = tokenizer
        self._colour = colour

    def title(self, text: str) -> str:
        """A heading."""
        return f"{_TITLE}{harmless(text)}{_RESET}" if self._colour else harmless(text)

    def sample(self, experience: Experience) -> Iterator[str]:
        """One sample, turn by turn."""
        parts = f" ({_numbers(experience.rewards)})" if experience.rewards else ""
        about = [f"Sample {experience.sample}", f"reward {experience.reward:g}{parts}"]
        about += [_numbers(experience.metrics)] if experience.metrics else []
        yield self.title(" · ".join([*about, f"{experience.generate_seconds:.1f} s"]))
        yield f"Answer: {shortened(experience.text, _MOST_CHARACTERS)!r}"
        for index, turn in enumerate(experience.turns):
            known = 0
            where = ""
            if turn.parent is not None:
                earlier = experience.turns[turn.parent]
                known = len(earlier.prompt_ids) + earlier.num_tokens
                where = f" · goes on from turn {turn.parent}"
            versions = ", ".join(f"{version}" for version, _ in turn.version_runs) or "none"
            earned = "" if turn.reward is None else f" · reward {turn.reward:g}"
            read = f"{len(turn.prompt_ids) - known} tokens read, {turn.num_tokens} sampled"
            yield ""
            yield self.title(
                f"Turn {index}{where} · {read} · version {versions} · {turn.finish_reason} · "
                f"temperature {turn.temperature:g}{earned}"
            )
            yield self._marked([(turn.prompt_ids[known:], False), (turn.token_ids, True)])
            yield f"  read    {_ids(turn.prompt_ids[known:])}"
            yield f"  sampled {_ids(turn.token_ids)}"

    def trained(self, group: Group) -> Iterator[str]:
        """The lines of tokens that a training step would compute, with the calls in each."""
        names = [(sample, index) for sample in group.experiences for index, turn in enumerate(sample.turns)]
        owners = [(sample, index) for sample, index in names if sample.turns[index].num_tokens]
        turns = [sample.turns[index] for sample, index in owners]
        if not turns:
            yield self.title("Nothing was sampled, so nothing would be trained")
            return
        lines = find_lines([turns])
        total = sum(turn.num_tokens for turn in turns)
        alone = sum(len(turn.prompt_ids) + turn.num_tokens for turn in turns)
        columns = sum(len(turns[members[-1]].prompt_ids) + turns[members[-1]].num_tokens for members in lines.turns)
        yield self.title(
            f"Would be trained: {_count(total, 'token')} in {_count(len(lines), 'line')}, of {columns} tokens in all "
            f"({alone} if every turn had a line of its own)"
        )
        for members, common in zip(lines.turns, lines.common.tolist(), strict=True):
            last = turns[members[-1]]
            ids, mask, apart = _line(last, [turns[index] for index in members])
            trained = sum(turns[index].num_tokens for index in members)
            calls = ", ".join(f"{owners[index][0].sample}.{owners[index][1]}" for index in members)
            shared = f" · begins like the line before with {_count(common, 'token')}" if common else ""
            yield ""
            yield self.title(f"Line of turns {calls} · {len(ids)} tokens, {trained} trained{shared}")
            cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
            yield self._marked([(ids[a:b], bool(mask[a])) for a, b in pairwise(cuts)])
            for place, token in apart:
                yield f"  token {place} is also {self._marked([(token, True)])}, where a turn ends"

    def _marked(self, parts: Sequence[tuple[Any, bool]]) -> str:
        """Token ids as text, each part as read or as sampled."""
        return "".join(self._part(ids.tolist(), sampled) for ids, sampled in parts if len(ids))

    def _part(self, ids: list[int], sampled: bool) -> str:
        text = harmless(shortened(self._tokenizer.decode(ids, skip_special_tokens=False), _MOST_CHARACTERS))
        if self._colour:
            return f"{_BRIGHT if sampled else _DIM}{text}{_RESET}"
        return f"⟦{text}⟧" if sampled else text


def _line(last: Turn, members: Sequence[Turn]) -> tuple[Any, Any, list[tuple[int, Any]]]:
    """Token ids of a line, which of them are trained, and the last tokens of turns that are not in it, by place.

    A turn's last token is predicted from the line and need not be part of it.
    """
    ids = np.concatenate([last.prompt_ids, last.token_ids])
    mask = np.zeros(len(ids), bool)
    apart = []
    for turn in members:
        end = len(turn.prompt_ids) + turn.num_tokens - 1
        mask[len(turn.prompt_ids) : end] = True
        if ids[end] == turn.token_ids[-1]:
            mask[end] = True
        else:
            apart.append((end, turn.token_ids[-1:]))
    return ids, mask, apart


def _ids(ids: Any) -> str:
    shown = ids.tolist()
    if len(shown) <= _MOST_IDS:
        return " ".join(map(str, shown))
    half = _MOST_IDS // 2
    return f"{_ids(ids[:half])} … [{len(shown) - 2 * half}] … {_ids(ids[-half:])}"


def _numbers(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in numbers.items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
