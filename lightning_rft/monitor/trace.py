"""Spans as a trace for Perfetto and chrome://tracing, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rft.monitor.spans import Span, position

__all__ = ["spans_of", "trace"]

_THREADS = {"rollout", "put", "train", "wait"}  # everything else moves weights


def trace(spans: Sequence[Span], *, title: str = "", dropped: int = 0) -> dict[str, Any]:
    """A Chrome trace, as JSON: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.

    Tracks become processes, and times microseconds since the first span. Slices of a thread may not overlap, so what a
    track does concurrently gets several threads.
    """
    zero = min((span.begin for span in spans), default=0.0)
    names: list[dict[str, Any]] = []
    slices: list[dict[str, Any]] = []
    for pid, track in enumerate(sorted({span.track for span in spans}, key=position), start=1):
        names += _named("process", track, pid, 0, pid)
        threads: dict[str, list[Span]] = defaultdict(list)
        for span in sorted((span for span in spans if span.track == track), key=lambda span: span.begin):
            threads[span.what if span.what in _THREADS else "weights"].append(span)
        tid = 1000 * pid  # unique in the whole trace, as viewers expect
        for kind, members in sorted(threads.items()):
            lanes = _lanes(members)
            count = max(lanes) + 1
            for lane in range(count):
                names += _named("thread", kind if count == 1 else f"{kind} {lane + 1}", pid, tid + lane, tid + lane)
            slices += [_slice(span, zero, pid, tid + lane) for span, lane in zip(members, lanes, strict=True)]
            tid += count
    return {
        "traceEvents": names + sorted(slices, key=lambda event: event["ts"]),
        "displayTimeUnit": "ms",
        "otherData": {"strategy": title, "began_monotonic_s": zero, "dropped_spans": dropped},
    }


def spans_of(trace: Mapping[str, Any]) -> list[Span]:
    """The spans of a trace of :func:`trace`, in seconds since the first."""
    events = trace["traceEvents"]
    tracks = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    return [
        Span(
            tracks[event["pid"]],
            event["cat"],
            event["ts"] / 1e6,
            (event["ts"] + event["dur"]) / 1e6,
            batch=event["args"].get("batch"),
            version=event["args"].get("version"),
            detail=event["args"].get("for", ""),
        )
        for event in events
        if event["ph"] == "X"
    ]


def _named(what: str, name: str, pid: int, tid: int, order: int) -> list[dict[str, Any]]:
    """Two metadata events that name and place a process or a thread."""
    event = {"ph": "M", "pid": pid, "tid": tid, "ts": 0}
    return [
        event | {"name": f"{what}_name", "args": {"name": name}},
        event | {"name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]


def _slice(span: Span, zero: float, pid: int, tid: int) -> dict[str, Any]:
    # Whole microseconds: with fractions, rounding would let neighbours overlap slightly, which viewers refuse.
    begin, end = (round((seconds - zero) * 1e6) for seconds in (span.begin, span.end))
    about = {"batch": span.batch, "version": span.version, "for": span.detail or None}
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.what,
        "ts": begin,
        "dur": max(0, end - begin),
        "pid": pid,
        "tid": tid,
        "args": {key: value for key, value in about.items() if value is not None},
    }


def _lanes(spans: Sequence[Span]) -> list[int]:
    """The lowest free lane of each span, for spans in order of their beginning."""
    ends: list[float] = []
    lanes = []
    for span in spans:
        lane = next((lane for lane, end in enumerate(ends) if end <= span.begin), len(ends))
        ends[lane : lane + 1] = [span.end]
        lanes.append(lane)
    return lanes
