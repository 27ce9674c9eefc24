"""The roster of a run: one record for each explorer whose engine is up, with all that rank 0 knows of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_rft.experience import GroupKey
from lightning_rft.explorer.messages import Started

__all__ = ["Record", "Roster", "Work"]


@dataclass
class Work:
    """A group that an explorer was asked for: when, and how many of its samples have not ended."""

    since: float
    samples: int


@dataclass
class Record:
    """What is known of one explorer. Times are seconds of :func:`time.monotonic`; only :class:`Roster` writes here."""

    engine: Started
    #: Groups that it was asked for and has not answered.
    work: dict[GroupKey, Work] = field(default_factory=dict)
    #: The version that it computes with; ``None`` before its first load, during a load and after one that broke off.
    loaded: int | None = None
    loading_since: float | None = None
    broke_off: bool = False
    #: Whether it has yet to say how it scores the text with what it loaded.
    unproven: bool = False
    #: Whether it needs weights before the next push, and whether it is loading them by itself.
    needs_weights: bool = False
    alone: bool = False
    #: When it last made progress with what it owes.
    progressed: float = 0.0

    @property
    def owes(self) -> bool:
        """Whether it was asked for anything that it has not answered."""
        return bool(self.work) or self.loading_since is not None or self.unproven


class Roster:
    """Tracks the explorers of one run. Knows no clock and is not thread-safe.

    Args:
        timeout_s: Seconds without progress after which an explorer that owes an answer is overdue.

    Example:
        >>> roster = Roster(timeout_s=10)
        >>> roster.started(0, Started(dtype="float32", world_size=1, nccl=False, max_num_seqs=64))
        >>> roster.asked(0, GroupKey(0, 0), samples=8, now=0)
        >>> roster.advanced(0, now=7)
        >>> roster.overdue(now=12), roster.overdue(now=18)
        ([], [0])
        >>> roster.died(0).work
        {GroupKey(batch=0, slot=0): Work(since=0, samples=8)}
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._records: dict[int, Record] = {}

    def started(self, explorer: int, engine: Started) -> None:
        """Adds an explorer whose engine is up."""
        self._records[explorer] = Record(engine)

    def died(self, explorer: int) -> Record | None:
        """Removes an explorer and returns its record, ``None`` if it was never up."""
        return self._records.pop(explorer, None)

    # Work

    def asked(self, explorer: int, key: GroupKey, samples: int, now: float) -> None:
        """Notes that an explorer was asked for a group of so many samples."""
        record = self._records.get(explorer)
        if record is not None:
            self._owes_more(record, now)
            record.work[key] = Work(now, samples)

    def ended(self, explorer: int, key: GroupKey, samples: int) -> None:
        """Notes that samples of a group have ended, which is yet to be answered."""
        self._records[explorer].work[key].samples -= samples

    def answered(self, explorer: int, key: GroupKey, now: float) -> float:
        """Notes that an explorer has answered with a group, or was told to forget it; returns when it was asked."""
        record = self._records[explorer]
        record.progressed = now
        return record.work.pop(key).since

    def advanced(self, explorer: int, now: float) -> None:
        """Notes that an explorer made progress, or owes nothing by itself."""
        record = self._records.get(explorer)
        if record is not None:
            record.progressed = now

    def excuse(self, seconds: float) -> None:
        """Takes back a time in which nobody listened."""
        for record in self._records.values():
            record.progressed += seconds

    # Weights

    def want_weights(self, *explorers: int) -> None:
        """Notes that explorers need weights before the next push."""
        for explorer in explorers:
            self._records[explorer].needs_weights = True

    def load_alone(self) -> list[int]:
        """Marks the explorers that need weights before the next push as about to load by themselves; returns them."""
        late = [explorer for explorer, record in self._records.items() if record.needs_weights]
        for explorer in late:
            self._records[explorer].alone = True
        return late

    def begin_load(self, explorer: int, now: float) -> None:
        """Notes that an explorer was told to load."""
        record = self._records.get(explorer)
        if record is not None:
            self._owes_more(record, now)
            record.loaded, record.loading_since, record.broke_off = None, now, False

    def loaded(self, explorer: int, version: int, now: float) -> tuple[float, bool]:
        """Notes that an explorer computes with a version; returns since when it loaded, and whether it did so alone."""
        record = self._records[explorer]
        assert record.loading_since is not None, "an explorer loaded what it was not told to"
        began, alone = record.loading_since, record.alone
        record.loaded, record.loading_since, record.progressed = version, None, now
        record.needs_weights = record.alone = False
        record.unproven = True
        return began, alone

    def scored(self, explorer: int, now: float) -> None:
        """Notes that an explorer has said how it scores the text with what it loaded."""
        record = self._records[explorer]
        record.unproven, record.progressed = False, now

    def sleeps(self, explorer: int, *, forgets: bool) -> None:
        """Notes that an explorer is told to sleep; one that ``forgets`` has no weights from then on."""
        record = self._records.get(explorer)
        if record is not None:
            record.loaded = None if forgets else record.loaded
            record.needs_weights = record.alone = False  # before it wakes

    def wants_weights(self) -> None:
        """Notes that all explorers without weights need some before the next push."""
        for record in self._records.values():
            record.needs_weights = record.needs_weights or record.loaded is None

    def load_broke_off(self, explorer: int, now: float) -> None:
        """Notes that an explorer's load broke off: it computes nothing until the next one."""
        record = self._records[explorer]
        record.loading_since, record.broke_off, record.progressed = None, True, now

    # Answers

    @property
    def members(self) -> dict[int, int]:
        """Explorer -> number of its processes that hold weights."""
        return {explorer: record.engine.world_size for explorer, record in list(self._records.items())}

    @property
    def with_weights(self) -> list[int]:
        """Explorers that compute with some version."""
        return [explorer for explorer, record in self._records.items() if record.loaded is not None]

    @property
    def any_needs_weights(self) -> bool:
        """Whether an explorer needs weights before the next push and is not loading them."""
        return any(record.needs_weights and not record.alone for record in self._records.values())

    @property
    def any_unproven(self) -> bool:
        """Whether an explorer has loaded weights and not proven yet that they are the trainer's."""
        return any(record.unproven for record in self._records.values())

    @property
    def work(self) -> set[GroupKey]:
        """Groups that some explorer works on."""
        return {key for record in self._records.values() for key in record.work}

    def is_loading(self, explorer: int) -> bool:
        """Whether an explorer is in the middle of a load."""
        return explorer in self._records and self._records[explorer].loading_since is not None

    def without(self, version: int, explorers: Iterable[int]) -> list[int]:
        """Those of ``explorers`` that are up and do not compute with a version."""
        return [index for index in explorers if index in self._records and self._records[index].loaded != version]

    def broken(self, explorers: Iterable[int]) -> list[int]:
        """Those of ``explorers`` that are up and whose last load broke off."""
        return [index for index in explorers if index in self._records and self._records[index].broke_off]

    def owed(self, explorer: int) -> str:
        """What an explorer was asked for and has not answered, in words."""
        record = self._records[explorer]
        work = record.work.values()
        samples = f"{sum(group.samples for group in work)} samples of {len(work)} groups"
        return samples + ", a load" * self.is_loading(explorer) + ", the scores of a text" * record.unproven

    def overdue(self, now: float) -> list[int]:
        """Explorers that owe an answer and have made no progress for ``timeout_s``."""
        return [
            explorer
            for explorer, record in self._records.items()
            if record.owes and now - record.progressed > self.timeout_s
        ]

    @staticmethod
    def _owes_more(record: Record, now: float) -> None:
        if not record.owes:
            record.progressed = now  # an idle stretch counts for nothing
