"""Where every token of a row sits, and what it sees."""

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RwkvConfig,
    T5Config,
)

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Support, Turn
from lightning_rft.trainer import layout as module
from lightning_rft.trainer.layout import layout
from lightning_rft.trainer.lines import find_lines
from lightning_rft.trainer.packing import pack, shares_prompts
from tests.trainer.agents import agents, lines_of


def turn(prompt, tokens, temperature=1.0):
    return Turn(prompt, tokens, (0.0,) * len(tokens), (0,) * len(tokens), "stop", temperature)


def star(samples):
    """20 columns of prompt, 39 of each completion."""
    return [turn(range(20), range(100 * sample, 100 * sample + 40)) for sample in range(samples)]


def columns(groups, **settings):
    return layout(find_lines(groups), **settings).columns


GROUPS = [
    [turn([5, 6], [7, 8, 9]), turn([1, 2, 3], [10]), turn([5, 6], [11, 12])],
    [turn([5, 6], [13, 14]), turn([5, 6], [15])],
]
TARGETS = [7, 8, 9, 10, 11, 12, 13, 14, 15]


def sees(packed):
    return (packed.attention_mask[:, 0] == 0).tolist()


def test_shared_rows_hold_each_prompt_of_a_group_once():
    packed = pack(GROUPS, shared=True, pad_id=99)
    assert packed.input_ids.tolist() == [[1, 2, 3, 99, 99], [5, 6, 7, 8, 11], [5, 6, 13, 99, 99]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 2], [0, 1, 2, 0, 0]]
    assert packed.target.tolist() == TARGETS
    assert packed.row.tolist() == [1, 1, 1, 0, 1, 1, 2, 2, 2]
    assert packed.keep.tolist() == [1, 2, 3, 4]
    assert packed.keep[packed.column].tolist() == [1, 2, 3, 2, 1, 4, 1, 2, 1]


def test_completion_sees_prompt_and_itself_and_padding_only_itself():
    mask = pack(GROUPS, shared=True).attention_mask
    assert mask.shape == (3, 1, 5, 5)
    assert sees(pack(GROUPS, shared=True))[1] == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True, True, False, False, True],
    ]
    assert sees(pack(GROUPS, shared=True))[0] == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [False, False, False, True, False],
        [False, False, False, False, True],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mask_is_zero_or_the_lowest_finite_number(dtype):
    mask = pack(GROUPS, shared=True, mask_dtype=dtype).attention_mask
    assert mask.dtype == dtype
    assert set(mask.float().unique().tolist()) == {0.0, float(torch.finfo(dtype).min)}


def test_ordinary_rows_hold_what_begins_alike_once_padded_on_the_right():
    packed = pack(GROUPS, shared=False, pad_id=99)
    assert packed.input_ids.tolist() == [[1, 2, 3, 99], [5, 6, 7, 8], [5, 6, 11, 99], [5, 6, 13, 99]]
    assert packed.attention_mask is None
    assert packed.position_ids.tolist() == 4 * [[0, 1, 2, 3]]
    assert packed.target.tolist() == TARGETS
    assert packed.row.tolist() == [1, 1, 1, 0, 2, 2, 3, 3, 3]
    assert packed.keep[packed.column].tolist() == [1, 2, 3, 2, 1, 2, 1, 2, 1]


def test_rows_share_only_as_far_as_attention_lets_it_pay():
    group = star(4)

    def shape(balance):
        return tuple(pack([group], shared=True, balance=balance).input_ids.shape)

    assert shape(1e9) == (1, 20 + 4 * 39)
    assert shape(500) == (2, 20 + 2 * 39)
    assert shape(1) == (4, 20 + 39)
    assert pack([group], shared=True, balance=1).attention_mask is None


def test_mask_of_a_shared_row_stays_below_a_limit_in_bytes(monkeypatch):
    groups = [star(4)] * 3

    def shape(limit, dtype=torch.float32):
        monkeypatch.setattr(module, "_MASK_BYTES", limit)
        packed = pack(groups, shared=True, mask_dtype=dtype, balance=1e9)
        assert packed.input_ids.numel() == columns(groups, shared=True, mask_dtype=dtype, balance=1e9)
        return tuple(packed.input_ids.shape)

    one, two = 4 * 176**2, 4 * 98**2
    assert shape(one) == shape(one // 2, torch.bfloat16) == (3, 176)
    assert shape(one - 1) == shape(two) == (6, 98)
    assert shape(two - 1) == (12, 59)


def test_short_groups_fill_the_width_that_a_long_one_needs():
    long, short = [turn([1], range(50))], [turn([2, 3], range(9 * i, 9 * i + 9)) for i in range(12)]
    packed = pack([long, short], shared=True, balance=1)
    assert packed.input_ids.shape == (3, 50)  # 6 completions of 8 columns fit in each


def test_conversation_is_one_row_and_what_it_reads_is_not_trained():
    first = turn([1, 2], [3, 4])
    second = turn([1, 2, 3, 4, 8, 9], [5])
    third = turn([1, 2, 3, 4, 8, 9, 5, 9], [6, 7])
    for order in ([first, second, third], [third, first, second]):
        packed = pack([order], shared=False)
        assert packed.input_ids.tolist() == [[1, 2, 3, 4, 8, 9, 5, 9, 6]]
        assert packed.attention_mask is None
        assert packed.target.tolist() == [token for one in order for token in one.token_ids]
        places = dict(zip(packed.target.tolist(), packed.keep[packed.column].tolist(), strict=True))
        assert places == {3: 1, 4: 2, 5: 5, 6: 7, 7: 8}
        assert pack([order], shared=True).input_ids.tolist() == packed.input_ids.tolist()


def test_fork_in_the_middle_of_an_answer_sees_what_lies_before_it():
    # the last goes on from the first token of the second's answer
    turns = [turn([1, 2], [3, 4, 5]), turn([1, 2], [6, 7, 8]), turn([1, 2, 6, 9, 9], [4, 4])]
    packed = pack([turns], shared=True, balance=1e9)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 6, 7, 9, 9, 4]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 3, 4, 5]]
    seen = [[key for key, visible in enumerate(row) if visible] for row in sees(packed)[0]]
    assert seen[3] == [0, 1, 2, 3]
    assert seen[5] == [0, 1, 4, 5]
    assert seen[8] == [0, 1, 4, 6, 7, 8]


def test_equal_turns_are_computed_once_and_trained_each():
    same = turn([1, 2], [3, 4], 0.5)
    packed = pack([[same, turn([1, 2], [3, 4], 2.0), turn([1, 2], [3])], [same]], shared=False)
    assert packed.input_ids.tolist() == [[1, 2, 3], [1, 2, 3]], "groups share nothing"
    assert packed.target.tolist() == [3, 4, 3, 4, 3, 3, 4]
    assert packed.row.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert packed.keep[packed.column].tolist() == [1, 2, 1, 2, 1, 1, 2]
    assert packed.temperature.tolist() == [0.5, 0.5, 2.0, 2.0, 1.0, 0.5, 0.5]


@given(
    seed=st.integers(0, 10**6),
    samples=st.sampled_from([3, 12]),
    balance=st.sampled_from([1.0, 20.0, 100.0, 1e9]),
    shared=st.booleans(),
    multiple=st.sampled_from([1, 16]),
    widest=st.sampled_from([16, 24, 1000]),
)
@settings(max_examples=100, deadline=None)
def test_every_sampled_token_is_predicted_once_from_its_own_text(seed, samples, balance, shared, multiple, widest):
    draw = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MASK_BYTES", 4 * widest**2)  # so that trees lie in several rows
        check([agents(draw, samples) for _ in range(draw.randint(1, 2))], shared, balance, multiple)


def check(groups, shared, balance, multiple):
    sampled = [[one for one in group if one.num_tokens] for group in groups]
    flat = [one for group in sampled for one in group]
    if not flat:
        return
    packed = pack(groups, shared=shared, balance=balance, multiple=multiple)
    width = packed.input_ids.shape[1]
    texts = [(*one.prompt_ids, *one.token_ids[:place]) for one in flat for place in range(one.num_tokens)]
    assert packed.target.tolist() == [token for one in flat for token in one.token_ids], "and nothing else"
    for text, row, kept in zip(texts, packed.row, packed.column, strict=True):
        column = packed.keep[kept]
        seen = torch.arange(width) <= column
        if packed.attention_mask is not None:
            seen &= packed.attention_mask[row, 0, column] == 0
        assert packed.position_ids[row][seen].tolist() == list(range(len(text)))
        assert tuple(packed.input_ids[row][seen].tolist()) == text
    assert packed.input_ids.numel() == columns(sampled, shared=shared, balance=balance, multiple=multiple)
    assert packed.attention_mask is None or width % multiple == 0
    # as many ordinary rows as there are texts that begin no other one of their group; shared rows are no more columns
    lines = [lines_of(group) for group in sampled]
    ordinary = sum(map(len, lines)) * max(len(line) for group in lines for line in group)
    assert packed.input_ids.numel() <= ordinary
    assert packed.attention_mask is not None or packed.input_ids.numel() == ordinary


@given(draw=st.randoms())
@settings(max_examples=100, deadline=None)
def test_what_begins_alike_is_computed_once_in_shared_rows(draw):
    group = [one for one in agents(draw) if one.num_tokens]
    if group:
        texts = lines_of(group)
        once = len({text[:end] for text in texts for end in range(1, len(text) + 1)})
        worth = 0.95  # for less gain, ordinary rows stay
        rows = len({text[0] for text in texts})
        assert columns([group], shared=True, balance=1e12) <= rows * once / worth


def test_index_tensors_are_int64_and_move_together():
    truncated = Turn([1], [2], [0.0], [0], "stop", temperature=0.5, support=Support([1], [2], [0.0]))
    packed = pack([GROUPS[0], [truncated]], shared=True)
    for name in ("input_ids", "position_ids", "keep", "row", "column", "target"):
        assert getattr(packed, name).dtype == torch.int64
    moved = packed.to("meta")
    assert all(value.device.type == "meta" for value in vars(moved).values())
    assert pack(GROUPS, shared=False).to("meta").attention_mask is None


def test_every_token_has_the_temperature_that_it_was_sampled_at():
    groups = [[turn([1], [2, 3], 0.5), turn([1], [4], 1.5)], [turn([5], [6, 7])]]
    packed = pack(groups, shared=True)
    assert packed.temperature.tolist() == [0.5, 0.5, 1.5, 1.0, 1.0]
    assert pack(groups[1:], shared=True).to("cpu").temperature is None


def test_turn_without_tokens_takes_no_room():
    with_empty = pack([[turn([1, 2], [3, 4]), turn([9], [])]], shared=True)
    assert with_empty.input_ids.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("shared", [True, False])
def test_what_cannot_be_packed_is_refused(shared):
    with pytest.raises(ValueError, match="empty prompt"):
        pack([[turn([], [1])]], shared=shared)
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([[turn([1], [])]], shared=shared)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_without_logprobs_is_refused(temperature):
    with pytest.raises(ConfigurationError, match="temperature above 0"):
        pack([[turn([1], [2]), turn([1], [2], temperature)]], shared=True)


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(), Qwen2Config(use_sliding_window=False), Qwen3Config(), GPT2Config(), Qwen3MoeConfig()],
    ids=lambda config: config.model_type,
)
def test_plain_attention_shares(config):
    assert shares_prompts(config, "sdpa")
    assert shares_prompts(config, "eager")
    assert not shares_prompts(config, "flash_attention_2")
    assert not shares_prompts(config, "flex_attention")


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(sliding_window=4),
        Qwen2Config(use_sliding_window=True, sliding_window=4, max_window_layers=0),
        Gemma2Config(),
        Qwen3NextConfig(),
        MambaConfig(),
        RwkvConfig(),
        T5Config(),
        BloomConfig(),
        FalconConfig(alibi=True),
    ],
    ids=lambda config: config.model_type,
)
def test_what_a_mask_cannot_govern_does_not_share(config):
    assert not shares_prompts(config, "sdpa")


def test_window_that_is_off_shares():
    assert shares_prompts(MistralConfig(sliding_window=None), "sdpa")
    assert shares_prompts(FalconConfig(alibi=False), "sdpa")
