"""What validation measured at several steps, as a table and as a picture, which needs matplotlib.

A row is a mapping with the ``step`` and metrics by name: ``val/reward`` over all tasks, ``val/hard/reward`` over a set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_rft.monitor.style import BLUE, ORANGE, style

__all__ = ["draw_curves", "table"]

Rows = Sequence[Mapping[str, Any]]

_WIDTH, _HEIGHT, _DPI = 12.0, 2.9, 160  # inches, of which a row of panels has the height


def table(rows: Rows) -> str:
    """A block of text for all tasks, and one for each set: a line for each row, a column for each metric."""
    blocks = []
    for name in _sets(rows):
        columns = _metrics(rows, name)
        lines = [["step", *columns]] + [
            [str(row["step"]), *(_number(column, row.get(f"{_prefix(name)}{column}")) for column in columns)]
            for row in rows
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        block = [
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        blocks.append("\n".join([name, *block] if name else block))
    return "\n\n".join(blocks)


def draw_curves(rows: Rows, path: Path) -> None:
    """Draws rewards, passed answers, their length and how many were cut off over the steps, as a PNG file."""
    import matplotlib.style
    from matplotlib.figure import Figure

    sets = _sets(rows)
    with matplotlib.style.context(["default", style()]):
        figure = Figure(figsize=(_WIDTH, _HEIGHT * len(sets)), dpi=_DPI, facecolor="white", layout="constrained")
        panels = figure.subplots(len(sets), 4, sharex=True, sharey="col", squeeze=False)
        for name, (reward, passed, length, truncated) in zip(sets, panels, strict=True):
            _plot(reward, rows, name, {"reward": BLUE})
            _plot(passed, rows, name, _colours(_metrics(rows, name)))
            _plot(length, rows, name, {"completion_length": BLUE})
            _plot(truncated, rows, name, {"truncated_share": BLUE})
            if len(sets) > 1:
                reward.set_ylabel(name or "all", fontweight="bold")
        first = panels[0]
        for panel, head in zip(first, ("Reward", "Passed", "Tokens per answer", "Answers cut off"), strict=True):
            panel.set_title(head)
        if len(first[1].lines) > 1:
            first[1].legend(loc="best")
        # once all is drawn, since it ends the scaling to what is
        first[2].set_ylim(bottom=0)
        for share in (first[1], first[3]):
            share.set_ylim(-0.03, 1.03)
        for panel in panels[-1]:
            panel.set_xlabel("step")
            panel.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        figure.savefig(path)


def _plot(panel: Any, rows: Rows, name: str, colours: Mapping[str, Any]) -> None:
    """Draws some metrics of a set, each in a colour."""
    for metric, colour in colours.items():
        points = [(row["step"], row[key]) for row in rows if (key := f"{_prefix(name)}{metric}") in row]
        if not points:  # all samples failed
            continue
        style = "--" if metric.startswith("maj_at_") else "-"
        panel.plot(*zip(*points, strict=True), style, color=colour, marker="o", label=metric.replace("_at_", "@"))


def _colours(metrics: Sequence[str]) -> dict[str, Any]:
    """Lines of what passed: darker for more answers, and the majority in a colour of its own."""
    from matplotlib import colormaps

    passes = [metric for metric in metrics if metric.startswith("pass_at_")]
    if len(passes) == 1:
        return {passes[0]: BLUE}
    shades = {metric: colormaps["Blues"](0.4 + 0.6 * i / (len(passes) - 1)) for i, metric in enumerate(passes)}
    return shades | {metric: ORANGE for metric in metrics if metric.startswith("maj_at_")}


def _sets(rows: Rows) -> list[str]:
    """Names of the sets; the first is empty, for all tasks."""
    names = dict.fromkeys(name.split("/")[1] for row in rows for name in row if name.count("/") == 2)
    return ["", *names]


def _metrics(rows: Rows, name: str) -> list[str]:
    prefix = _prefix(name)
    found = dict.fromkeys(key for row in rows for key in row if key.startswith(prefix))
    return [key.removeprefix(prefix) for key in found if "/" not in key.removeprefix(prefix)]


def _prefix(name: str) -> str:
    return f"val/{name}/" if name else "val/"


def _number(metric: str, value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if metric == "completion_length" else f"{value:.3f}"
