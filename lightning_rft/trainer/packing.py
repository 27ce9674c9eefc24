"""Token rows for the trainer's forward pass: the samples of a group share one copy of their prompt.

A shared row is ``prompt | completion 1 | completion 2 | ...`` under a mask by which a completion sees the prompt and
itself, with positions that continue from the prompt's end each time. What the model computes for every token is what
it computes on a row of its own, for two to four times fewer tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Truncation, Turn
from lightning_rft.sampling import MAX_SUPPORT

__all__ = ["Packed", "columns", "pack", "shares_prompts"]

_CAUSAL = 0.5  # time of causal attention, for which the kernels are made, over that of attention with a mask
_WORTH = 0.95  # of the time of ordinary rows; for less gain they stay
# Of a shared row's mask: one of 32k tokens in half precision. Rows that are computed sooner, as far as that, need less
# memory too, the mask included; wider ones have not been thought through.
_MASK_BYTES = 2**31


@dataclass(frozen=True)
class Packed:
    """R rows of L columns, K of which are kept because their logits predict some of the N trained tokens."""

    input_ids: Tensor  # [R, L]
    #: Within the text that a token belongs to [R, L]. Padding goes on counting in ordinary rows, where transformers
    #: would take a position that falls for the start of another text, and is 0 in shared ones.
    position_ids: Tensor
    #: Added to the attention scores of shared rows [R, 1, L, L]. ``None`` for ordinary rows: padding on their right is
    #: seen by no token of a causal model.
    attention_mask: Tensor | None
    keep: Tensor  # columns, ascending [K]
    row: Tensor  # of each trained token [N]
    column: Tensor  # index into ``keep`` of the column that predicts each trained token [N]
    target: Tensor  # id of each trained token [N]
    temperature: Tensor | None  # that each was sampled at [N], float32; None where all are 1
    #: Ids that each was chosen from [N, K], int32, filled up with its own; -1 first for the whole vocabulary. ``None``
    #: where that holds for all.
    support: Tensor | None

    def to(self, device: torch.device | str) -> Packed:
        """The same rows with every tensor on ``device``."""
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items() if tensor is not None})


def pack(
    turns: Sequence[Sequence[Turn]],
    *,
    shared: bool,
    mask_dtype: torch.dtype = torch.float32,
    pad_id: int = 0,
    balance: float = 3000.0,
    multiple: int = 1,
) -> Packed:
    """Lays groups of turns out in rows; trained tokens keep the order of the turns.

    With ``shared``, turns of a group with the same prompt share a row where that is cheaper, which is exact only for
    models that :func:`shares_prompts` accepts. ``mask_dtype`` is that of the attention queries, ``balance`` the length
    of a shared row, in tokens, at which attention takes as long as the rest of the model; the width of shared rows is a
    multiple of ``multiple``. Raises ``ValueError`` if no turn has a sampled token, or one that has was given an empty
    prompt.

    Example:
        >>> turns = [Turn((5, 6), tokens, (0, 0), (0, 0), "stop") for tokens in ((7, 8), (9, 4))]
        >>> packed = pack([turns], shared=True)
        >>> packed.input_ids, packed.position_ids
        (tensor([[5, 6, 7, 9]]), tensor([[0, 1, 2, 2]]))
        >>> packed.keep, packed.column, packed.target
        (tensor([1, 2, 3]), tensor([0, 1, 0, 2]), tensor([7, 8, 9, 4]))
    """
    sampled = _sampled(turns)
    flat = [turn for group in sampled for turn in group]
    if not flat:
        raise ValueError("nothing to pack: no turn has a sampled token")
    for turn in flat:
        if not len(turn.prompt_ids):
            raise ValueError("a turn has an empty prompt: there is no position to predict its first token from")
        if not turn.temperature > 0:
            raise ConfigurationError(
                f"experience that was sampled at temperature={turn.temperature} cannot be trained with: "
                "log-probabilities need a temperature above 0"
            )
        if turn.support is None and turn.sampling != Truncation():
            raise ConfigurationError(
                f"experience that was sampled with {turn.sampling}, but without the tokens to choose from, cannot be "
                f"trained with: sample with top_k from 1 to {MAX_SUPPORT}"
            )
    row, width = _layout(sampled, shared, mask_dtype, balance, multiple)
    shared = len(set(row)) < len(row)

    rows = [_Row() for _ in set(row)]
    column: list[np.ndarray] = []
    for turn, r in zip(flat, row, strict=True):
        column.append(rows[r].add(turn))
    lengths = torch.tensor([turn.num_tokens for turn in flat])
    keep, kept = torch.unique(torch.from_numpy(np.concatenate(column)), return_inverse=True)
    input_ids = _rectangle([row.ids for row in rows], width, pad_id)
    if shared:
        position_ids = _rectangle([row.positions for row in rows], width, 0)
        attention_mask = _additive_mask(_rectangle([row.segments for row in rows], width, -1), mask_dtype)
    else:
        position_ids = torch.arange(width).repeat(len(input_ids), 1)
        attention_mask = None
    target = np.concatenate([turn.token_ids for turn in flat])
    return Packed(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        keep=keep,
        row=torch.tensor(row).repeat_interleave(lengths),
        column=kept,
        target=torch.from_numpy(target).long(),
        temperature=None
        if all(turn.temperature == 1 for turn in flat)
        else torch.tensor([turn.temperature for turn in flat], dtype=torch.float32).repeat_interleave(lengths),
        support=None if all(turn.support is None for turn in flat) else _supports(flat, target),
    )


def columns(
    turns: Sequence[Sequence[Turn]],
    *,
    shared: bool,
    mask_dtype: torch.dtype = torch.float32,
    balance: float = 3000.0,
    multiple: int = 1,
) -> int:
    """Columns of all rows, padding included, that :func:`pack` lays groups of turns out in; 0 for no sampled token."""
    sampled = _sampled(turns)
    if not any(sampled):
        return 0
    row, width = _layout(sampled, shared, mask_dtype, balance, multiple)
    return len(set(row)) * width


class _Row:
    """A row to which turns with the same prompt are added."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[np.ndarray] = []  # 0: the prompt, s > 0: the row's s-th completion
        self._width = 0

    def add(self, turn: Turn) -> np.ndarray:
        """Adds a turn; returns the columns that predict its tokens."""
        prompt, read = len(turn.prompt_ids), turn.num_tokens - 1  # nothing is predicted from the last token
        if not self.ids:
            self._append(turn.prompt_ids, first=0)
        start = self._width
        self._append(turn.token_ids[:-1], first=prompt)
        return np.concatenate([[prompt - 1], np.arange(start, start + read)])

    def _append(self, ids: np.ndarray, first: int) -> None:
        self.segments.append(np.full(len(ids), len(self.ids)))
        self.positions.append(np.arange(first, first + len(ids)))
        self.ids.append(ids)
        self._width += len(ids)


def _sampled(groups: Sequence[Sequence[Turn]]) -> list[list[Turn]]:
    return [[turn for turn in group if turn.num_tokens] for group in groups]


def _layout(
    groups: Sequence[Sequence[Turn]], shared: bool, mask_dtype: torch.dtype, balance: float, multiple: int
) -> tuple[list[int], int]:
    """The row of each turn, of all groups in order, and the width of the rows, in the layout computed soonest."""
    flat = [turn for group in groups for turn in group]
    prompts = [len(turn.prompt_ids) for turn in flat]
    lengths = [turn.num_tokens - 1 for turn in flat]  # nothing is predicted from the last token
    widest = max(prompt + length for prompt, length in zip(prompts, lengths, strict=True))
    best = list(range(len(flat))), widest
    if not shared:
        return best
    members: dict[tuple[int, bytes], list[int]] = {}  # turns with the same prompt, group by group
    group_of = [number for number, group in enumerate(groups) for _ in group]
    for index, turn in enumerate(flat):
        members.setdefault((group_of[index], turn.prompt_ids.tobytes()), []).append(index)
    alike = list(members.values())
    least = _WORTH * len(flat) * widest * (balance + _CAUSAL * widest)
    # All rows are as wide as the widest, so what is chosen is that width: where some row is just full.
    full = [prompts[some[0]] + columns for some in alike for columns in accumulate(lengths[index] for index in some)]
    widths = np.unique(-(-np.maximum(full, widest) // multiple) * multiple)
    widths = widths[widths**2 * mask_dtype.itemsize <= _MASK_BYTES]
    # From the least number of rows at each width follows which are not worth filling.
    room = widths[:, None] - [prompts[some[0]] for some in alike]
    total = np.array([sum(lengths[index] for index in some) for some in alike])
    fewest = np.maximum(1, -(-total // np.maximum(room, 1))).sum(1)
    bounds = fewest * widths * (balance + widths)
    for bound, width in sorted(zip(bounds.tolist(), widths.tolist(), strict=True)):
        if bound >= least:
            break
        row = _fill(alike, prompts, lengths, width)
        rows = max(row) + 1
        cost = rows * width * (balance + width)
        if cost < least:
            best, least = (row, width), cost
    return best


def _fill(alike: Sequence[Sequence[int]], prompts: Sequence[int], lengths: Sequence[int], width: int) -> list[int]:
    """The row of each turn, where a row takes what it can of turns with the same prompt within this width."""
    row = [0] * len(prompts)
    used: list[int] = []
    for members in alike:
        first = len(used)
        for index in members:
            r = next((r for r in range(first, len(used)) if used[r] + lengths[index] <= width), len(used))
            if r == len(used):
                used.append(prompts[index])
            used[r] += lengths[index]
            row[index] = r
    return row


def _supports(turns: Sequence[Turn], target: np.ndarray) -> Tensor:
    """The ids that each token was chosen from [N, K]; see :class:`Packed`."""
    counts, ids = map(np.concatenate, zip(*map(_choices, turns), strict=True))
    width = int(counts.max()) + 1  # a column more than needed, so that the token itself is never left out
    table = target[:, None].repeat(width, axis=1)
    table[np.arange(width) < counts[:, None]] = ids
    return torch.from_numpy(table)


def _choices(turn: Turn) -> tuple[np.ndarray, np.ndarray]:
    """How many ids each token was chosen from, and all these ids; -1 for the whole vocabulary."""
    if turn.support is not None:
        return turn.support.counts, turn.support.token_ids
    return np.ones(turn.num_tokens, np.int32), np.full(turn.num_tokens, -1, np.int32)


def _rectangle(rows: Sequence[Sequence[np.ndarray]], width: int, fill: int) -> Tensor:
    """Rows that are given in parts as one int64 tensor, filled up on the right."""
    filled = np.full((len(rows), width), fill)
    for target, parts in zip(filled, rows, strict=True):
        values = np.concatenate(parts)
        target[: len(values)] = values
    return torch.from_numpy(filled)


def _additive_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, L] segments (-1 in padding) to [R, 1, L, L]."""
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    # Padding sees itself, so that no row of the softmax is empty: that would be NaN, in the gradient too.
    itself = torch.eye(length, dtype=torch.bool)
    allowed = itself | (causal & (query >= 0) & ((key == 0) | (key == query)))
    mask = torch.full(allowed.shape, torch.finfo(dtype).min, dtype=dtype)
    return mask.masked_fill_(allowed, 0.0)[:, None]


# A setting whose name looks like this, when it is on, means that a token is influenced by its place in the row, or by
# what lies between it and the prompt, in ways that a 4-D mask and position_ids do not govern.
_SUSPICIOUS = re.compile(
    r"""
    mamba | rwkv | ssm | lstm | state_size | recurrent | lru_ | hybrid | layers?_block_type | block_types  # state
    | linear_(num|key|value|conv|attn|attention) | ^conv_ | _conv_ | conv_(kernel|size|l_cache)            # mixing
    | ^sliding_window | window_size | local_attention | attention_window | chunk_size | attention_types?$  # windows
    | index_topk | sparse_attention                                                                         # choice
    | alibi | relative_attention | bidirectional | is_encoder_decoder | cross_attention                    # places
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Models of this kind whose configuration does not show it. About 45 other causal models of transformers 5.19 were
# compared, tiny and with random weights, and are exact in shared rows.
_UNSUITABLE = frozenset(
    {"bloom", "blt", "cpmant", "ctrl", "git", "mpt", "openai-gpt", "roformer", "rwkv", "trocr", "xlm", "xlnet"}
)


def shares_prompts(config: Any, attn_implementation: str) -> bool:
    """Whether rows with a shared prompt are exact for a model, judged cautiously from its ``transformers`` config.

    They are where every layer is full causal attention that adds the mask it is given and takes positions from
    ``position_ids``. Linear, state-space and convolution layers ignore the mask, sliding-window layers silently
    discard a 4-D one, and ALiBi ignores the positions.
    """
    if attn_implementation not in ("sdpa", "eager"):
        return False
    return all(_is_plain(settings) for settings in _levels(config.to_dict()))


def _is_plain(settings: Mapping[str, Any]) -> bool:
    if settings.get("model_type") in _UNSUITABLE or False in (settings.get("is_causal"), settings.get("is_decoder")):
        return False
    if any(kind != "full_attention" for kind in settings.get("layer_types") or ()):
        return False
    off = {"sliding_window"} if settings.get("use_sliding_window") is False else set()
    return not any(value and name not in off and _SUSPICIOUS.search(name) for name, value in settings.items())


def _levels(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration and those nested in it: a multimodal model's text model is one."""
    yield {name: value for name, value in settings.items() if isinstance(name, str)}
    for value in settings.values():
        if isinstance(value, Mapping):
            yield from _levels(value)
