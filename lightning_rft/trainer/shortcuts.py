"""Shortcuts of the training step, each tried once against what the plain model computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_rft.experience import Group, Turn
from lightning_rft.trainer.layout import layout
from lightning_rft.trainer.linear_logprobs import LogitTransform
from lightning_rft.trainer.lines import Lines
from lightning_rft.trainer.logprobs import kept_logits, replaced_forward, token_logprobs
from lightning_rft.trainer.micro_batches import by_group
from lightning_rft.trainer.packing import Packed, pack, shares_prompts
from lightning_rft.trainer.weighted import sampled_turns

__all__ = ["FastPath", "longest", "probe", "random_groups", "settled"]

# Times the hidden size: 6 by the count of operations, where a layer has the usual 12 weights per hidden unit squared,
# and 5 to 7 as measured on a CPU.
_BALANCE = 5.0
_SHORTEST_BALANCE = 500.0  # of small models, where overhead dominates
_SHORT = 8, 8, 2  # tokens of prompt and completion, and completions, to try the head with
# On CUDA, where the kernel with a mask would otherwise keep a padded copy of it for every layer.
_MULTIPLE = 16
# Mean difference, in nats, between log-probs computed in rows of different layouts. Rounding gives about 1e-5 in
# float32 and 0.03 in bfloat16 (of random tokens, which are improbable); an ignored mask gives far more.
_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1


@dataclass(frozen=True)
class FastPath:
    """The shortcuts that are exact for a model."""

    #: What the model makes of its output head's logits, if log-probs may be computed chunk by chunk from its input.
    chunked_head: LogitTransform | None
    #: Whether the samples of a group may share rows.
    shared: bool
    #: Length of a shared row, in tokens, at which attention takes as long as the rest of the model.
    balance: float
    #: Dtype of the attention queries.
    mask_dtype: torch.dtype
    #: What the width of shared rows is a multiple of.
    multiple: int
    #: Tokens of the longest text that they were tried with, until a batch has settled them.
    tried: int | None = None

    def pack(self, turns: Sequence[Sequence[Turn]]) -> Packed:
        """Packs turns into rows; see :func:`~lightning_rft.trainer.packing.pack`."""
        return pack(turns, shared=self.shared, **self._layout)

    def columns(self, lines: Lines) -> int:
        """Columns of all rows, padding included, that :meth:`pack` lays the turns of these lines out in."""
        return layout(lines, shared=self.shared, **self._layout).columns

    @property
    def _layout(self) -> dict[str, Any]:
        return {"mask_dtype": self.mask_dtype, "balance": self.balance, "multiple": self.multiple}


def _alone(what: str, function: Callable[[], Any]) -> Any:
    return function()


def probe(
    model: Any,
    turns: Sequence[Sequence[Turn]],
    attn_implementation: str,
    agree: Callable[[str, Callable[[], Any]], Any] = _alone,
) -> FastPath:
    """Tries the shortcuts on made-up rows, without a gradient, and reports on rank zero those that fail.

    All ranks must call it together, since a sharded model's forward is a collective; the number of forwards follows
    from the model's kind alone, never from ``turns`` or from a result. The texts and the shared row are as long as the
    longest of ``turns`` (groups of turns, perhaps none), because a model's window may make the difference. Of several
    ranks the first has the turns; ``agree`` names a function that it calls, and all get the result.
    """
    with torch.no_grad(), _undisturbed(model):
        head = _logit_transform(model)
        if isinstance(head, str):
            rank_zero_info(f"Log-probs are computed from all logits at once, which takes more memory: {head}.")
        path = FastPath(
            chunked_head=None if isinstance(head, str) else head,
            shared=shares_prompts(model.config, attn_implementation),
            balance=max(_SHORTEST_BALANCE, _BALANCE * model.get_input_embeddings().weight.shape[-1]),
            mask_dtype=_query_dtype(model),
            multiple=_MULTIPLE if model.device.type == "cuda" else 1,
        )
        if path.shared:
            difference = _row_difference(model, path, agree("the longest text", lambda: _measures(path, turns)))
            tolerance = _TOLERANCE.get(path.mask_dtype, _HALF_TOLERANCE)
            if not difference <= tolerance:  # or NaN
                path = replace(path, shared=False)
                rank_zero_info(
                    f"Samples of a group are trained in rows of their own: in shared rows their log-probs differ by "
                    f"{difference:.2g} nats on average, and rounding explains no more than {tolerance:g}."
                )
    # Autocast keeps the weights that it cast, and those that it cast here have no gradient.
    torch.clear_autocast_cache()
    return path


def settled(
    path: FastPath | None, model: Any, groups: Sequence[Group], agree: Callable[[str, Callable[[], Any]], Any] = _alone
) -> FastPath:
    """The shortcuts of a run, given its first batch: as they were tried, if that was with texts that are no shorter."""
    if path is not None and path.tried is None:
        return path
    turns = by_group(sampled_turns(groups))
    if path is None or agree("the first batch's longest text", lambda: longest(turns)) > (path.tried or 0):
        path = probe(model, turns, model.config._attn_implementation, agree)
    return replace(path, tried=None)


def longest(turns: Sequence[Sequence[Turn]]) -> int:
    """Tokens of the longest text."""
    return max((len(turn.prompt_ids) + turn.num_tokens for group in turns for turn in group), default=0)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Turns off dropout, which makes rows differ, and restores the random state, which a resumed run must repeat."""
    trains = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in trains.items():
                module.training = mode


def _logit_transform(model: Any) -> LogitTransform | str:
    """What a model makes of its output head's logits, or why that is not known.

    The head is made to return known numbers. They are as large as logits get, so that softcapping shows whatever the
    weights are; and integers, so that no dtype rounds them.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return "the output head is not a plain linear layer"
    returned: list[Tensor] = []
    split: list[bool] = []

    def known(hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:-1], head.out_features)
        returned.append(
            (torch.arange(torch.Size(shape).numel(), device=hidden.device) % 101 - 50).view(shape).to(hidden)
        )
        split.append(hasattr(head.weight, "placements"))
        return returned[-1]

    packed = pack(random_groups(model, *_SHORT), shared=False).to(model.device)
    with replaced_forward(head, known):
        logits = kept_logits(model, packed)
    if len(returned) != 1 or logits.shape != returned[0].shape:
        return "the logits are not as many as the output head gives"
    if split[0]:
        return "the output head is split among devices"
    if torch.equal(logits.float(), returned[0].float()):
        return LogitTransform()
    rounding = 4 * torch.finfo(logits.dtype).eps  # of a few operations
    for transform in _named_transforms(model.config.get_text_config().to_dict()):
        if torch.allclose(logits.float(), transform(returned[0].float().clone()), rtol=rounding, atol=0):
            return transform
    return "the logits are not those of the output head, scaled or capped by a number of the model's config"


def _named_transforms(settings: dict[str, Any]) -> list[LogitTransform]:
    """Those by numbers whose names in a model's config speak of a scale or a cap of the logits."""
    numbers = {name: float(value) for name, value in settings.items() if type(value) in (int, float) and value}
    scales = [value for name, value in numbers.items() if re.search("logits?_scal|(output|head)_multiplier", name)]
    caps = [value for name, value in numbers.items() if re.search("soft_?cap", name)]
    return [
        LogitTransform(scale, cap)
        for scale in (1.0, *scales, *(1 / value for value in scales))
        for cap in (None, *caps)
        if (scale, cap) != (1.0, None)
    ]


def _query_dtype(model: Any) -> torch.dtype:
    """That of autocast, or what the embeddings give the layers, which a sharded model may cast to another dtype."""
    device = model.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtypes: list[torch.dtype] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    try:
        kept_logits(model, pack(random_groups(model, *_SHORT), shared=False).to(model.device))
    finally:
        hook.remove()
    return dtypes[0]


def _row_difference(model: Any, path: FastPath, measures: tuple[int, int, int]) -> float:
    """Mean difference in nats between log-probs in a shared row and in ordinary ones."""
    made_up = random_groups(model, *measures)
    shared, ordinary = (
        token_logprobs(model, packed.to(model.device), chunked_head=path.chunked_head)[0]
        for packed in (
            # whatever attention costs, so that the made-up samples do share a row
            replace(path, balance=1e12).pack(made_up),
            replace(path, shared=False).pack(made_up),
        )
    )
    return float((shared - ordinary).abs().mean())


def _measures(path: FastPath, turns: Sequence[Sequence[Turn]]) -> tuple[int, int, int]:
    """Prompt tokens, completion tokens and completions: as long as the longest text, in a row as wide as the widest."""
    texts = [turn for group in turns for turn in group if turn.num_tokens]
    if not texts:
        return _SHORT
    most = max(texts, key=lambda turn: len(turn.prompt_ids) + turn.num_tokens)
    prompt, completion = len(most.prompt_ids), most.num_tokens
    width = path.pack(turns).input_ids.shape[1]
    return prompt, completion, max(2, (width - prompt) // max(1, completion - 1))


def random_groups(model: Any, prompt: int, completion: int, samples: int, groups: int = 1) -> list[list[Turn]]:
    """Groups of random tokens, the same in every process."""
    vocabulary = model.config.get_text_config().vocab_size
    random = torch.Generator().manual_seed(0)
    # Low and high ids are often special.
    ids = torch.randint(vocabulary // 8, vocabulary // 4, (groups, prompt + samples * completion), generator=random)
    nothing = (0,) * completion
    completions = ids[:, prompt:].reshape(groups, samples, completion).tolist()
    return [
        [Turn(prompt_ids, tokens, nothing, nothing, "length") for tokens in group]
        for prompt_ids, group in zip(ids[:, :prompt].tolist(), completions, strict=True)
    ]
