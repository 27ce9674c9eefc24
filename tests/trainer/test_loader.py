"""How batches become items of a loop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.trainer.loader import ExperienceLoader, MicroBatch, ValidationLoader, split
from lightning_rft.trainer.ranks import Ranks


def make_group(batch: int, slot: int, *lengths: int) -> Group:
    """A group whose samples have ``lengths`` tokens each, all of the batch's own version."""
    experiences = tuple(
        Experience(
            str(slot),
            sample,
            (Turn((1, 2), (3,) * n, (-1.0,) * n, (batch,) * n, "stop"),),
            float(sample),
        )
        for sample, n in enumerate(lengths or (1, 2))
    )
    return Group(GroupKey(batch, slot), str(slot), experiences)


def slots(shares: Sequence[Sequence[Group]]) -> list[list[int]]:
    return [[group.key.slot for group in share] for share in shares]


# split


@given(st.lists(st.integers(1, 1000), max_size=20), st.integers(1, 6))
def test_split_deals_every_group_to_one_share_and_balances_tokens(lengths: list[int], parts: int) -> None:
    groups = [make_group(0, slot, n) for slot, n in enumerate(lengths)]
    shares = split(groups, parts)
    assert len(shares) == parts
    assert sorted(slot for share in slots(shares) for slot in share) == list(range(len(lengths)))
    tokens = [sum(group.num_tokens for group in share) for share in shares]
    # the largest-first rule: taking its smallest group away, no share was heavier than the lightest one is
    for share, total in zip(shares, tokens, strict=True):
        if share:
            assert total - min(group.num_tokens for group in share) <= min(tokens)


def test_split_does_not_depend_on_the_order_of_arrival() -> None:
    groups = [make_group(0, slot, n) for slot, n in enumerate([5, 5, 9, 5, 1])]
    assert slots(split(groups, 2)) == slots(split(groups[::-1], 2)) == [[2, 3], [0, 1, 4]]
    assert slots(split(groups, 7))[5:] == [[], []]


# ExperienceLoader


class Batches:
    """A source that has every batch ready, of ``size`` groups, and counts up when the last share was used."""

    def __init__(self, size: int = 4) -> None:
        self.version = 0
        self.asked: list[int] = []
        self._size = size

    def wanted(self, batch: int) -> list[Group]:
        self.asked.append(batch)
        return [make_group(batch, slot) for slot in range(self._size)]


def make_loader(source: Batches, items: int, *, accumulate: int = 1) -> ExperienceLoader:
    return ExperienceLoader(lambda: source, Ranks(), batches=3, accumulate=accumulate, items=items, done=lambda: 0)


def consume(loader: ExperienceLoader, source: Batches) -> list[MicroBatch]:
    taken = []
    for item in loader:
        taken.append(item)
        assert source.asked[-1] == item.batch == source.version  # nothing is asked for ahead of time
        source.version += item.last
    return taken


@pytest.mark.parametrize(
    ("accumulate", "items", "shares"),
    [
        (1, 3, [1, 1, 1]),
        (2, 6, [2, 2, 2]),
        (2, 3, [2, 1]),  # the limit falls into the second batch, which is trained whole all the same
        (4, 5, [4, 1]),
        (4, 3, [3]),
        (3, 1, [1]),
        (2, 0, []),
    ],
)
def test_limits_cut_an_epoch_but_no_batch(accumulate: int, items: int, shares: list[int]) -> None:
    source = Batches()
    loader = make_loader(source, items, accumulate=accumulate)
    assert len(loader) == 3 * accumulate  # limits are Lightning's to apply
    taken = consume(loader, source)
    assert len(taken) == items
    assert source.asked == list(range(len(shares)))
    for batch, parts in enumerate(shares):
        mine = [item for item in taken if item.batch == batch]
        assert len(mine) == parts
        assert [item.last for item in mine] == [False] * (parts - 1) + [True]
        assert sorted(group.key.slot for item in mine for group in item.groups) == [0, 1, 2, 3]
        assert {item.batch_tokens for item in mine} == {4 * 3}


def test_epochs_go_on_where_the_last_one_ended() -> None:
    source = Batches()
    loader = make_loader(source, 3)
    consume(loader, source)
    consume(loader, source)
    assert source.asked == list(range(6))


def test_shares_outnumber_groups() -> None:
    source = Batches(size=1)
    taken = consume(make_loader(source, 3, accumulate=3), source)
    assert [len(item.groups) for item in taken] == [1, 0, 0]
    assert [item.batch_tokens for item in taken] == [3, 3, 3]


def test_time_waited_is_told_once_a_batch() -> None:
    source = Batches()
    assert [item.wait_seconds > 0 for item in make_loader(source, 2, accumulate=2)] == [False, True]


# ValidationLoader


def test_validation_explores_at_once_and_waits_in_order() -> None:
    events: list[str] = []

    def begin() -> int:
        events.append("begin")
        return 5

    def explored(index: int) -> Group:
        events.append(f"wait {index}")
        return make_group(0, index)

    loader = ValidationLoader(begin, explored, size=7, chunk=2)
    assert len(loader) == 4
    assert events == []
    iterator = iter(loader)
    assert [group.key.slot for group in next(iterator).groups] == [0, 1]
    assert events == ["begin", "wait 0", "wait 1"]
    assert [[group.key.slot for group in item.groups] for item in iterator] == [[2, 3], [4]]  # as many as were begun
