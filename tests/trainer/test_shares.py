"""What each rank is sent of a batch: its own share of the turns, and nothing of another's."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lightning as L
import pytest
import torch

from lightning_rft.channel import Channel
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.monitor.metrics import BatchMetrics
from lightning_rft.pickling import dumps
from lightning_rft.trainer.limits import EpochProgress
from lightning_rft.trainer.loader import BatchPart, ExperienceLoader, ExplorationLoader
from lightning_rft.trainer.micro_batches import Cut, micro_batches
from lightning_rft.trainer.objectives.grpo import GRPO
from lightning_rft.trainer.plan import planned
from lightning_rft.trainer.ranks import Ranks
from lightning_rft.trainer.shortcuts import FastPath
from lightning_rft.trainer.weighted import weighted_turns

COUNT = 4
PATH = FastPath(chunked_head=None, shared=True, balance=500.0, mask_dtype=torch.float32, multiple=1)


def groups(number: int = 12, samples: int = 4) -> list[Group]:
    """Turns of 20 to 90 tokens, no two of which have anything in common but the prompt."""
    chance = random.Random(0)

    def turn(slot: int) -> Turn:
        n = chance.randint(20, 90)
        ids = [chance.getrandbits(30) for _ in range(n)]
        return Turn(tuple(range(slot, slot + 30)), ids, [-chance.random() for _ in ids], [0] * n, "stop")

    return [
        Group(
            GroupKey(0, slot),
            str(slot),
            tuple(Experience(str(slot), i, (turn(slot),), chance.random(), text="x" * 50) for i in range(samples)),
        )
        for slot in range(number)
    ]


class Listed(Channel):
    """A channel that keeps what is sent."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.sent: list[bytes] = []

    def send(self, message: Any) -> None:
        self.sent.append(dumps(message))
        super().send(message)


class Source:
    """One batch, which is ready."""

    version = 0
    on_policy = True

    def wanted(self, batch: int) -> list[Group]:
        return groups()


class Four:
    """Four ranks in this process, each on a thread of its own."""

    def __init__(self) -> None:
        pairs = {rank: socket.socketpair() for rank in range(1, COUNT)}
        self.to = {rank: Listed(ours.detach()) for rank, (ours, _) in pairs.items()}
        others = [Ranks(rank, COUNT, {0: Channel(theirs.detach())}) for rank, (_, theirs) in pairs.items()]
        self.ranks = [Ranks(0, COUNT, dict(self.to)), *others]

    def run(self, function: Callable[[Ranks], Any]) -> list[Any]:
        """What a function returns on each."""
        with ThreadPoolExecutor(COUNT) as threads:
            return list(threads.map(function, self.ranks, timeout=60))

    def sent(self, rank: int) -> bytes:
        """All that a rank was sent."""
        return b"".join(self.to[rank].sent)


@pytest.fixture
def four() -> Iterator[Four]:
    made = Four()
    yield made
    made.run(Ranks.close)


def loader(ranks: Ranks, accumulate: int = 1) -> ExperienceLoader:
    return ExperienceLoader(
        Source,
        ranks,
        batches=1,
        accumulate=accumulate,
        items=accumulate,
        max_new_tokens=90,
        progress=EpochProgress(L.Trainer(barebones=True)),
    )


def share(batch: BatchPart, max_tokens: int | None) -> list[Cut]:
    return planned(batch, GRPO(), PATH, None, max_tokens=max_tokens)


@pytest.mark.parametrize(("accumulate", "max_tokens"), [(1, None), (2, None), (1, 400)])
def test_the_shares_are_those_of_one_plan_and_nobody_is_sent_anothers(
    four: Four, accumulate: int, max_tokens: int | None
) -> None:
    shares = four.run(lambda ranks: share(next(iter(loader(ranks, accumulate))), max_tokens))
    plan = micro_batches(
        weighted_turns(groups(), GRPO(), max_new_tokens=90),
        accumulate * COUNT,
        max_tokens=max_tokens,
        columns=PATH.columns,
        shared=True,
    )
    assert [shares[number % COUNT][number // COUNT] for number in range(accumulate * COUNT)] == plan
    own = [{turn.turn._token_ids for piece in part for turn in piece} for part in map(sum_of, shares)]
    assert sum(map(len, own)) == len(set().union(*own)) == 48
    for rank in range(1, COUNT):
        known = {turn for turn in set().union(*own) if turn in four.sent(rank)}
        assert known == own[rank]


def sum_of(parts: list[Cut]) -> Cut:
    return [piece for part in parts for piece in part]


def test_a_rank_is_sent_about_its_share_of_the_bytes(four: Four) -> None:
    four.run(lambda ranks: share(next(iter(loader(ranks))), None))
    whole = len(dumps(groups()))
    sent = [len(four.sent(rank)) for rank in range(1, COUNT)]
    print(f"a batch of {whole} bytes; the others are sent {sent}, and were sent {[whole] * (COUNT - 1)}")
    assert all(size < whole / COUNT * 1.2 for size in sent)


def test_what_is_only_explored_is_dealt(four: Four) -> None:
    batches = four.run(lambda ranks: next(iter(ExplorationLoader(lambda index: (index, groups()), ranks, 1))))
    assert [batch.groups for batch in batches] == [groups()[rank::COUNT] for rank in range(COUNT)]
    assert all(len(four.sent(rank)) < len(dumps(groups())) / 3 for rank in range(1, COUNT))


def test_all_ranks_log_the_metrics_of_the_groups(four: Four) -> None:
    def collected(ranks: Ranks) -> dict[str, float]:
        metrics = BatchMetrics()
        metrics.update_groups(next(iter(loader(ranks))).groups, 3, ranks.agree)
        return {name: value for name, value in metrics.collect().items() if "per_second" not in name}

    first, *others = four.run(collected)
    assert others == [first] * (COUNT - 1)
    assert first["rft/staleness_max"] == 3 and 0 < first["rft/reward"] < 1
