"""The look of figures with axes."""

from __future__ import annotations

from typing import Any

__all__ = ["BLUE", "ORANGE", "style"]

BLUE, ORANGE = "#2A6CAB", "#D98324"
_INK, _FAINT, _GRID = "#333333", "#777777", "#EAEAEA"


def style() -> dict[str, Any]:
    """Settings for matplotlib."""
    return {
        **{"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "text.color": _INK, "axes.labelcolor": _INK},
        **{"xtick.color": _FAINT, "ytick.color": _FAINT, "axes.edgecolor": _GRID, "axes.spines.top": False},
        **{
            "axes.ymargin": 0.1,
            "lines.markersize": 3.5,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": _GRID,
            "axes.axisbelow": True,
        },
        **{"lines.linewidth": 1.6, "legend.frameon": False, "xtick.major.size": 0, "ytick.major.size": 0},
    }
