"""How batches become items of a loop."""

from __future__ import annotations

import lightning as L
import pytest

from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.trainer.limits import EpochProgress
from lightning_rft.trainer.loader import BatchPart, ExperienceLoader, ValidationLoader
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


# ExperienceLoader


class Batches:
    """A source that has every batch ready, of ``size`` groups, and counts up when the last share was used."""

    def __init__(self, size: int = 4) -> None:
        self.version = 0
        self.asked: list[int] = []
        self._size = size

    on_policy = True

    def wanted(self, batch: int) -> list[Group]:
        self.asked.append(batch)
        return [make_group(batch, slot) for slot in range(self._size)]


def make_loader(source: Batches, items: int, *, accumulate: int = 1) -> ExperienceLoader:
    return ExperienceLoader(
        lambda: source,
        Ranks(),
        batches=3,
        accumulate=accumulate,
        items=items,
        max_new_tokens=8,
        progress=EpochProgress(L.Trainer(barebones=True)),
    )


def consume(loader: ExperienceLoader, source: Batches) -> list[BatchPart]:
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
        assert [(item.part, item.parts, item.first) for item in mine] == [(i, parts, i == 0) for i in range(parts)]
        for item in mine:
            assert [group.key.slot for group in item.groups] == [0, 1, 2, 3]
            assert item.on_policy and item.max_new_tokens == 8


def test_epochs_go_on_where_the_last_one_ended() -> None:
    source = Batches()
    loader = make_loader(source, 3)
    consume(loader, source)
    consume(loader, source)
    assert source.asked == list(range(6))


# ValidationLoader


def test_validation_explores_at_once_and_waits_in_order() -> None:
    events: list[str] = []

    def begin() -> range:
        events.append("begin")
        return range(3, 8)

    def explored(index: int) -> Group:
        events.append(f"wait {index}")
        return make_group(0, index)

    loader = ValidationLoader(begin, explored, size=7, chunk=2, val_set="hard", samples=3)
    assert len(loader) == 4
    assert events == []
    iterator = iter(loader)
    first = next(iterator)
    assert [group.key.slot for group in first.groups] == [3, 4]
    assert (first.val_set, first.samples, first.first, first.last, first.ends) == ("hard", 3, True, False, False)
    assert events == ["begin", "wait 3", "wait 4"]
    rest = list(iterator)
    assert [[group.key.slot for group in item.groups] for item in rest] == [[5, 6], [7]]  # as many as were begun
    assert [(item.last, item.ends) for item in rest] == [(False, False), (True, True)]
    others = list(ValidationLoader(lambda: range(2), explored, size=2, chunk=2, ends=False))
    assert [(item.last, item.ends) for item in others] == [(True, False)]
