"""A picture of spans, which only drawing it needs matplotlib for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_rft.monitor.layout import Block, last_batches
from lightning_rft.monitor.spans import Interval, Span

__all__ = ["KINDS", "draw"]

#: kind -> fill, edge, name in the legend, letters on its blocks
KINDS = {
    "rollout": ("#FCE8B2", "#D9B24C", "Rollout", "R"),
    "buffer": ("#A9C8EC", "#5A8FCB", "Buffer", ""),
    "train": ("#BFE0B4", "#6FAA5F", "Train", "T"),
    "sync": ("#D8C5EE", "#9873C4", "Sync. weight (NCCL/Gloo)", "S"),
    "checkpoint": ("#F6B5AC", "#D2695C", "Sync. weight (Checkpoint: C write, c load)", "C"),
    "wait": ("#FAFAFA", "#D4D4D4", "Waiting", ""),
}
_DPI = 160
# inches
_WIDTH, _ROW, _BUFFER_ROW, _GAP = 12.0, 0.56, 0.28, 0.16
_TOP, _BOTTOM, _RIGHT, _THIN = 0.4, 0.74, 0.25, 0.01
_INK, _FAINT = "#333333", "#777777"


def draw(spans: Sequence[Span], path: str | Path, *, title: str = "", batches: int = 8, dropped: int = 0) -> None:
    """Draws the last ``batches`` trained batches, from at least one span, as a PNG file."""
    import matplotlib.style

    rows, window, note = last_batches(spans, batches)
    if dropped:
        note += f" · the {dropped} oldest spans were dropped"
    zero = min(span.begin for span in spans)
    with matplotlib.style.context(["default", {"hatch.linewidth": 0.6}]):  # in place of the user's style
        _paint(rows, window, zero, title, note, Path(path))


class _Canvas:
    """A figure in inches, on which text can be measured before it is written."""

    def __init__(self, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # not by pyplot, which has windows and global figures
        self.figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(0, height))
        self.axes.set_axis_off()

    def box(self, left: float, right: float, low: float, high: float, kind: str) -> None:
        from matplotlib.patches import Rectangle

        fill, edge, *_ = KINDS[kind]
        look: dict[str, Any] = {"hatch": "//////", "linewidth": 0} if kind == "wait" else {"linewidth": 0.8}
        self.axes.add_patch(Rectangle((left, low), right - left, high - low, facecolor=fill, edgecolor=edge, **look))

    def line(self, x: Interval, y: Interval, color: str, order: float = 1.0) -> None:
        self.axes.plot(x, y, color=color, linewidth=0.8, zorder=order, solid_capstyle="butt")

    def text(self, x: float, y: float, text: str, size: float = 9, color: str = _INK, **look: Any) -> float:
        """Writes, vertically centred, and returns the width."""
        self.axes.text(x, y, text, fontsize=size, color=color, va="center_baseline", **look)
        return self.width(text, size, look.get("weight", "normal"))

    def width(self, text: str, size: float, weight: str = "normal") -> float:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight=weight)
        return float(self.renderer.get_text_width_height_descent(text, font, False)[0]) / _DPI

    def label(self, left: float, right: float, low: float, high: float, labels: Sequence[str], kind: str) -> None:
        """Writes the first of the labels that fits a rectangle, if any."""
        for text in labels:
            for size in (9, 7):
                fits = self.width(text, size) + 0.08 <= right - left and size * 1.15 / 72 <= high - low
                if fits:
                    paper = {"facecolor": KINDS[kind][0], "edgecolor": "none", "pad": 1.5} if kind == "wait" else None
                    color = _FAINT if kind == "wait" else _INK
                    self.text((left + right) / 2, (low + high) / 2, text, size, color, ha="center", bbox=paper)
                    return


def _paint(
    rows: Mapping[str, Sequence[Block]], window: Interval, zero: float, title: str, note: str, path: Path
) -> None:
    tall = {track: _BUFFER_ROW if track == "buffer" else _ROW for track in rows}
    floor = _BOTTOM + _GAP / 2
    ceiling = floor + sum(tall.values()) + _GAP * len(rows)
    canvas = _Canvas(ceiling + _TOP)
    left = 0.3 + max(canvas.width(track.capitalize(), 10) for track in rows)
    right = _WIDTH - _RIGHT
    scale = (right - left) / (window[1] - window[0])

    def place(seconds: float) -> float:
        return left + (min(max(seconds, window[0]), window[1]) - window[0]) * scale

    canvas.text(left, ceiling + 0.2, title, 12, weight="bold")
    canvas.text(right, ceiling + 0.2, note, 8, _FAINT, ha="right")
    _paint_axis(canvas, (left, right), (floor, ceiling), (window[0] - zero, window[1] - zero))
    low = ceiling
    for track, blocks in rows.items():
        low -= tall[track] + _GAP
        canvas.text(left - 0.12, low + (_GAP + tall[track]) / 2, track.capitalize(), 10, ha="right")
        for block in blocks:
            edges = low + _GAP / 2 + block.low * tall[track], low + _GAP / 2 + block.high * tall[track]
            visible = [(block.begin, block.end)] if block.visible is None else block.visible
            pieces = [(place(begin), place(end)) for begin, end in visible]
            for begin, end in pieces:
                canvas.box(begin, max(end, begin + _THIN), *edges, block.kind)
            for tick in block.ticks:
                canvas.line((place(tick),) * 2, (edges[0], edges[0] + (edges[1] - edges[0]) / 4), KINDS[block.kind][1])
            if pieces:
                widest = max(pieces, key=lambda piece: piece[1] - piece[0])
                canvas.label(*widest, *edges, block.labels, block.kind)
    _paint_legend(canvas, left)
    canvas.figure.savefig(path)


def _paint_axis(canvas: _Canvas, x: Interval, y: Interval, seconds: Interval) -> None:
    from matplotlib.ticker import MaxNLocator

    canvas.line(x, (y[0], y[0]), _FAINT)
    ticks = MaxNLocator(nbins=10, steps=[1, 2, 5, 10]).tick_values(*seconds)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        if seconds[0] <= tick <= seconds[1]:
            at = x[0] + (x[1] - x[0]) * (tick - seconds[0]) / (seconds[1] - seconds[0])
            canvas.line((at, at), y, "#EDEDED", 0.0)
            canvas.text(at, y[0] - 0.12, f"{tick:.{digits}f} s", 8, _FAINT, ha="center")


def _paint_legend(canvas: _Canvas, left: float) -> None:
    for kind, (_, _, name, letter) in KINDS.items():
        canvas.box(left, left + 0.3, 0.16, 0.34, kind)
        if letter:
            canvas.text(left + 0.15, 0.25, letter, 8, ha="center")
        left += 0.38 + canvas.text(left + 0.38, 0.25, name, 8.5) + 0.3
