"""Token rows for the trainer's forward pass: what the calls of a group have in common is computed once.

A call whose prompt extends another call's prompt and answer lies in the same row, since a token of a causal model sees
nothing that follows it. What the prompt adds, a tool's result for example, is read and not trained. Calls of a group
that go different ways may share a row too: a tree of tokens, depth first (``prompt | completion 1 | completion 2``),
under a mask by which a token sees its ancestors, with positions that continue from the fork each time. What the model
computes for every token is what it computes on a row of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Truncation, Turn
from lightning_rft.sampling import MAX_SUPPORT
from lightning_rft.trainer.layout import layout
from lightning_rft.trainer.lines import find_lines

__all__ = ["Packed", "pack", "shares_prompts"]


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

    With ``shared``, turns of a group that begin alike share a row where that is cheaper, which is exact only for
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
    sampled = [[turn for turn in group if turn.num_tokens] for group in turns]
    flat = [turn for group in sampled for turn in group]
    if not flat:
        raise ValueError("nothing to pack: no turn has a sampled token")
    for turn in flat:
        _check(turn)
    lines = find_lines(sampled)
    chosen = layout(lines, shared=shared, mask_dtype=mask_dtype, balance=balance, multiple=multiple)
    rows = [_Row(chosen.width, pad_id) for _ in range(chosen.rows)]
    places: dict[int, tuple[int, NDArray[np.int64]]] = {}  # row of each turn, and columns that predict its tokens
    for members, r, common in zip(lines.turns, chosen.row, chosen.common, strict=True):
        path = rows[r].add(flat[members[-1]], common)
        for index in members:
            first = len(flat[index].prompt_ids) - 1
            places[index] = r, path[first : first + flat[index].num_tokens]
    row, column = zip(*(places[index] for index in range(len(flat))), strict=True)
    lengths = torch.tensor([turn.num_tokens for turn in flat])
    keep, kept = torch.unique(torch.from_numpy(np.concatenate(column)), return_inverse=True)
    if chosen.shared:
        position_ids = _stacked([one.positions for one in rows])
        attention_mask = _additive_mask(_stacked([one.ends for one in rows]), mask_dtype)
    else:
        position_ids = torch.arange(chosen.width).repeat(len(rows), 1)
        attention_mask = None
    target = np.concatenate([turn.token_ids for turn in flat])
    return Packed(
        input_ids=_stacked([one.ids for one in rows]),
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


def _check(turn: Turn) -> None:
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


class _Row:
    """A row to which lines are added, depth first."""

    def __init__(self, width: int, pad_id: int) -> None:
        self.ids = np.full(width, pad_id, dtype=np.int64)
        self.positions = np.zeros(width, dtype=np.int64)
        #: The first column behind those that see each one; padding is seen by itself, so that no softmax is empty: that
        #: would be NaN, in the gradient too.
        self.ends = np.arange(1, width + 1)
        self._path = np.empty(0, dtype=np.int64)
        self._used = 0

    def add(self, turn: Turn, common: int) -> NDArray[np.int64]:
        """Adds a turn's line, of which the first columns are those of the line before; returns all of its columns."""
        line = np.concatenate([turn.prompt_ids, turn.token_ids[:-1]])
        new = np.arange(self._used, self._used + len(line) - common)
        self._path = np.concatenate([self._path[:common], new])
        self._used += len(new)
        self.ids[new] = line[common:]
        self.positions[new] = np.arange(common, len(line))
        self.ends[self._path] = self._used
        return self._path


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


def _stacked(rows: Sequence[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


def _additive_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, L], the column before which the last that sees each one lies, to [R, 1, L, L]."""
    query = torch.arange(ends.shape[1])[:, None]
    allowed = (query >= query.T) & (query < ends[:, None])
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
