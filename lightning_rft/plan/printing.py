"""A plan as a table and as a picture, which needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_rft.monitor.style import BLUE, ORANGE, style
from lightning_rft.plan.planner import Row

__all__ = ["draw_plan", "table"]

_WIDTH, _ROW, _DPI = 12.0, 0.26, 160  # inches, of which a row has the last
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "strategy": lambda row: row.case.name,
    "explorers": lambda row: str(row.case.explorers),
    "s/step": lambda row: f"{row.step_s:.2f}",
    "trainer idle": lambda row: f"{row.trainer_idle:.0%}",
    "explorers idle": lambda row: f"{row.explorer_idle:.0%}",
    "staleness": lambda row: f"{row.staleness_mean:.1f}",
    "max": lambda row: str(row.staleness_max),
}


def table(rows: Sequence[Row]) -> str:
    """A line for each case."""
    lines = [list(_COLUMNS), *([show(row) for show in _COLUMNS.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def draw_plan(rows: Sequence[Row], best: Sequence[Row], path: Path) -> None:
    """Draws seconds a step, idle shares and staleness side by side, as a PNG file; ``best`` rows stand out."""
    import matplotlib.style
    from matplotlib.figure import Figure

    places = range(len(rows))
    with matplotlib.style.context(["default", style()]):
        figure = Figure(figsize=(_WIDTH, 1 + _ROW * len(rows)), dpi=_DPI, facecolor="white", layout="constrained")
        seconds, idle, stale = figure.subplots(1, 3, sharey=True)
        colours = [ORANGE if row in best else BLUE for row in rows]
        seconds.barh(places, [row.step_s for row in rows], color=colours)
        _pair(idle, rows, {"trainer": lambda row: row.trainer_idle, "explorers": lambda row: row.explorer_idle})
        _pair(stale, rows, {"mean": lambda row: row.staleness_mean, "maximum": lambda row: row.staleness_max})
        heads = "Seconds a step", "Idle share", "Staleness, batches"
        for panel, head in zip((seconds, idle, stale), heads, strict=True):
            panel.set_title(head)
            panel.set_xlim(left=0)
            panel.grid(axis="y", visible=False)
        several = len({row.case.explorers for row in rows}) > 1
        names = [row.case.name + (f", {row.case.explorers} explorers" if several else "") for row in rows]
        seconds.set_yticks(places, names)
        seconds.invert_yaxis()
        figure.savefig(path)


def _pair(panel: Any, rows: Sequence[Row], values: dict[str, Callable[[Row], float]]) -> None:
    """Draws two bars for every row."""
    for (label, value), offset, colour in zip(values.items(), (-0.2, 0.2), (BLUE, ORANGE), strict=True):
        panel.barh(
            [place + offset for place in range(len(rows))], list(map(value, rows)), 0.4, color=colour, label=label
        )
    panel.legend(loc="best")
