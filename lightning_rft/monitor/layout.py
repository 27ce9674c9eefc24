"""Layout of a timeline's picture as plain data: the blocks of each track and their labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_rft.monitor.spans import Interval, Span, position, union

__all__ = ["Block", "last_batches", "layout"]

_KIND = {"put": "buffer", "load": "sync", "write checkpoint": "checkpoint", "load checkpoint": "checkpoint"}
_TRANSFERS = {"sync": "S", "load": "S", "write checkpoint": "C", "load checkpoint": "c"}
_LANES = 4
_NEAR = 0.002  # share of the picture's width; nearer blocks are drawn as one
_STRIP = 0.36  # share of a row's height that background work gets, with the gap above it


@dataclass(frozen=True)
class Block:
    """A rectangle in the row of a track: times in seconds, edges as shares of the row's height."""

    kind: str
    begin: float
    end: float
    labels: tuple[str, ...] = ()  #: The first that fits is written.
    low: float = 0.0
    high: float = 1.0
    ticks: tuple[float, ...] = ()
    visible: tuple[Interval, ...] | None = None  #: The parts that no other block covers; None for all.


def last_batches(spans: Sequence[Span], batches: int) -> tuple[dict[str, list[Block]], Interval, str]:
    """The blocks of each track in the last trained batches, from at least one span; begin and end; and a note on it."""
    begin, end = min(span.begin for span in spans), max(span.end for span in spans)
    trained = sorted(span.end for span in spans if span.what == "train")
    if len(trained) > batches:
        begin, note = trained[-batches - 1], f"the last {batches} of {len(trained)} batches"
    else:
        end, note = max(end, begin + 0.01), f"{len(trained)} batch{'es' * (len(trained) != 1)}"
    shown = [span for span in spans if span.begin < end and span.end > begin]
    rows = {
        track: layout([span for span in shown if span.track == track], (end - begin) * _NEAR)
        for track in sorted({span.track for span in spans}, key=position)
    }
    return rows, (begin, end), note


def layout(spans: Sequence[Span], near: float) -> list[Block]:
    """The blocks of a track, those on top last; blocks less than ``near`` seconds apart count as touching."""
    rollouts = _stack(_by_batch("rollout", spans, near), near)
    puts = _stack(_by_batch("put", spans, math.inf), near)
    trains = [Block("train", span.begin, span.end, _labels(span)) for span in spans if span.what == "train"]
    weights = [
        Block(_KIND.get(span.what, span.what), span.begin, span.end, _labels(span))
        for span in spans
        if span.what in _TRANSFERS
    ]
    waits = [Block("wait", span.begin, span.end, (span.cause,)) for span in spans if span.what == "wait"]
    if any(_overlap(block, train) > near for block in weights for train in trains):
        # another thread moves weights during training: it gets a strip of its own
        weights = [replace(block, high=_STRIP - 0.08) for block in weights]
        trains = [replace(block, low=_STRIP) for block in trains]
        waits = [replace(block, low=_STRIP, visible=_uncovered(block, trains, near)) for block in waits]
    else:
        # an engine that loads weights computes nothing else
        rollouts = [replace(block, visible=_uncovered(block, weights, 0.0)) for block in rollouts]
        busy = [*rollouts, *trains, *weights]
        waits = [replace(block, visible=_uncovered(block, busy, near)) for block in waits]
    return [*waits, *puts, *rollouts, *trains, *weights]


def _by_batch(what: str, spans: Iterable[Span], near: float) -> list[Block]:
    """Blocks of one kind, merged where they touch and are of one batch."""
    batches: dict[tuple[str, ...], list[Span]] = {}
    for span in sorted((span for span in spans if span.what == what), key=lambda span: span.batch or 0):
        batches.setdefault(_labels(span), []).append(span)
    return [
        Block(_KIND.get(what, what), begin, end, labels, ticks=tuple(s.end for s in members if what == "put"))
        for labels, members in batches.items()
        for begin, end in union(((span.begin, span.end) for span in members), near)
    ]


def _stack(blocks: Iterable[Block], near: float) -> list[Block]:
    """Stacks blocks that overlap in time; if there are too many, they join the last block of the last lane."""
    stacks: list[list[list[Block]]] = []  # of lanes of blocks; stacks do not overlap in time
    reach = -math.inf
    for block in sorted(blocks, key=lambda block: block.begin):
        if block.begin >= reach - near:
            stacks.append([])
        lanes = stacks[-1]
        free = next((lane for lane in lanes if block.begin >= lane[-1].end - near), None)
        if free is not None:
            free.append(replace(block, begin=max(block.begin, free[-1].end)))
        elif len(lanes) < _LANES:
            lanes.append([block])
        else:
            last = lanes[-1][-1]
            label = f"{last.labels[0].partition('–')[0]}–{block.labels[0].lstrip('R')}"
            end = max(last.end, block.end)
            lanes[-1][-1] = replace(last, end=end, labels=(label,), ticks=last.ticks + block.ticks)
        reach = max(reach, block.end)
    return [
        replace(block, low=1 - (index + 1) / len(lanes), high=1 - index / len(lanes))
        for lanes in stacks
        for index, lane in enumerate(lanes)
        for block in lane
    ]


def _overlap(one: Block, other: Block) -> float:
    return min(one.end, other.end) - max(one.begin, other.begin)


def _uncovered(block: Block, others: Iterable[Block], shortest: float) -> tuple[Interval, ...]:
    """The parts of a block that no other covers, if longer than ``shortest``."""
    pieces, begin = [], block.begin
    for first, last in union((other.begin, other.end) for other in others if _overlap(block, other) > 0):
        pieces.append((begin, first))
        begin = last
    pieces.append((begin, block.end))
    return tuple((begin, end) for begin, end in pieces if end - begin > shortest)


def _labels(span: Span) -> tuple[str, ...]:
    if span.what in _TRANSFERS:
        letter = _TRANSFERS[span.what]
        return (letter,) if span.version is None else (f"{letter} v{span.version}", letter)
    letter = {"rollout": "R", "train": "T"}.get(span.what, "")
    return (letter if span.batch is None else f"{letter}{span.batch}",)
