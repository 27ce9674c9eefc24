"""Who is heard when a push breaks off."""

from __future__ import annotations

import time

import pytest

from lightning_rft.errors import DeadlineError, ExplorerError, TransportError
from lightning_rft.sync import collective


class Explorers:
    """Nothing failed, until the news of it has arrived."""

    def __init__(self, news_after: int | None) -> None:
        self.asked = 0
        self._news_after = news_after

    def raise_failures(self) -> None:
        self.asked += 1
        if self._news_after is not None and self.asked > self._news_after:
            raise ExplorerError("its own words")


def broken() -> None:
    raise RuntimeError("connection closed by peer")


def watched(function: object, explorers: Explorers, timeout_s: float = 30.0) -> None:
    collective._watched(function, explorers, time.monotonic() + timeout_s)  # type: ignore[arg-type]


def test_an_explorers_own_error_goes_first_though_it_arrives_later() -> None:
    with pytest.raises(ExplorerError, match="its own words"):
        watched(broken, Explorers(news_after=5))


def test_a_push_that_breaks_off_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "_NEWS_S", 0.1)
    with pytest.raises(TransportError, match="connection closed by peer"):
        watched(broken, Explorers(news_after=None))


def test_an_error_and_a_deadline_end_a_push_that_hangs() -> None:
    with pytest.raises(ExplorerError, match="its own words"):
        watched(lambda: time.sleep(2), Explorers(news_after=3))
    with pytest.raises(DeadlineError, match=r"raise CollectiveTransport\(timeout_s=...\)"):
        watched(lambda: time.sleep(2), Explorers(news_after=None), timeout_s=0.1)


def test_a_push_that_works() -> None:
    done: list[int] = []
    watched(lambda: done.append(1), Explorers(news_after=None))
    assert done == [1]
