"""Where every token of a row sits, and what it sees."""

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
from lightning_rft.trainer import packing as module
from lightning_rft.trainer.packing import columns, pack, shares_prompts


def turn(prompt, tokens, temperature=1.0):
    return Turn(prompt, tokens, (0.0,) * len(tokens), (0,) * len(tokens), "stop", temperature)


GROUPS = [
    [turn([5, 6], [7, 8, 9]), turn([1, 2, 3], [10]), turn([5, 6], [11, 12])],
    [turn([5, 6], [13, 14]), turn([5, 6], [15])],
]
TARGETS = [7, 8, 9, 10, 11, 12, 13, 14, 15]


def sees(packed):
    return (packed.attention_mask[:, 0] == 0).tolist()


def test_shared_rows_hold_each_prompt_of_a_group_once():
    packed = pack(GROUPS, shared=True, pad_id=99)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 11], [1, 2, 3, 99, 99], [5, 6, 13, 99, 99]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 0, 0], [0, 1, 2, 0, 0]]
    assert packed.target.tolist() == TARGETS
    assert packed.row.tolist() == [0, 0, 0, 1, 0, 0, 2, 2, 2]
    assert packed.keep.tolist() == [1, 2, 3, 4]
    assert packed.keep[packed.column].tolist() == [1, 2, 3, 2, 1, 4, 1, 2, 1]


def test_completion_sees_prompt_and_itself_and_padding_only_itself():
    mask = pack(GROUPS, shared=True).attention_mask
    assert mask.shape == (3, 1, 5, 5)
    assert sees(pack(GROUPS, shared=True))[0] == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True, True, False, False, True],
    ]
    assert sees(pack(GROUPS, shared=True))[1] == [
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


def test_ordinary_rows_hold_one_turn_each_padded_on_the_right():
    packed = pack(GROUPS, shared=False, pad_id=99)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8], [1, 2, 3, 99], [5, 6, 11, 99], [5, 6, 13, 99], [5, 6, 99, 99]]
    assert packed.attention_mask is None
    assert packed.position_ids.tolist() == 5 * [[0, 1, 2, 3]]
    assert packed.target.tolist() == TARGETS
    assert packed.row.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4]
    assert packed.keep[packed.column].tolist() == [1, 2, 3, 2, 1, 2, 1, 2, 1]


def test_rows_share_only_as_far_as_attention_lets_it_pay():
    group = [turn(range(20), range(40)) for _ in range(4)]  # 20 columns of prompt, 39 of each completion

    def shape(balance):
        return tuple(pack([group], shared=True, balance=balance).input_ids.shape)

    assert shape(1e9) == (1, 20 + 4 * 39)
    assert shape(500) == (2, 20 + 2 * 39)
    assert shape(1) == (4, 20 + 39)
    assert pack([group], shared=True, balance=1).attention_mask is None


def test_mask_of_a_shared_row_stays_below_a_limit_in_bytes(monkeypatch):
    groups = [[turn(range(20), range(40)) for _ in range(4)] for _ in range(3)]

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
    long, short = [turn([1], range(50))], [turn([2, 3], range(9)) for _ in range(12)]
    packed = pack([long, short], shared=True, balance=1)
    assert packed.input_ids.shape == (3, 50)  # 6 completions of 8 columns fit in each


turns = st.builds(
    turn,
    st.sampled_from([(5,), (6, 7), (5, 6, 7, 8, 9), (6,) * 12]),
    st.lists(st.integers(10, 99), max_size=15),
)


@given(
    groups=st.lists(st.lists(turns, max_size=5), min_size=1, max_size=4),
    balance=st.sampled_from([1.0, 20.0, 100.0, 1e9]),
    shared=st.booleans(),
    multiple=st.sampled_from([1, 16]),
)
@settings(max_examples=100, deadline=None)
def test_every_token_is_predicted_from_its_own_text(groups, balance, shared, multiple):
    sampled = [one for group in groups for one in group if one.num_tokens]
    if not sampled:
        assert columns(groups, shared=shared, balance=balance, multiple=multiple) == 0
        return
    packed = pack(groups, shared=shared, balance=balance, multiple=multiple)
    ordinary = pack(groups, shared=False)
    texts = [(*one.prompt_ids, *one.token_ids[:place]) for one in sampled for place in range(one.num_tokens)]
    assert packed.target.tolist() == [token for one in sampled for token in one.token_ids]
    for text, row, kept in zip(texts, packed.row, packed.column, strict=True):
        column = packed.keep[kept]
        mask = packed.attention_mask
        seen = torch.arange(packed.input_ids.shape[1]) <= column
        if mask is not None:
            seen &= mask[row, 0, column] == 0
        order = packed.position_ids[row][seen]
        assert order.tolist() == list(range(len(text)))
        assert tuple(packed.input_ids[row][seen].tolist()) == text
    assert packed.input_ids.numel() <= ordinary.input_ids.numel()
    assert packed.input_ids.numel() == columns(groups, shared=shared, balance=balance, multiple=multiple)
    assert packed.attention_mask is None or packed.input_ids.shape[1] % multiple == 0


def test_index_tensors_are_int64_and_move_together():
    truncated = Turn([1], [2], [0.0], [0], "stop", temperature=0.5, support=Support([1], [2], [0.0]))
    packed = pack([*GROUPS, [truncated]], shared=True)
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
