"""What validation measured over the steps of a run, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_rft.monitor.curves import draw_curves, table


def row(step: int, *sets: str, samples: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = {"step": step, "checkpoint": f"{step}.ckpt"}
    for prefix in ("val", *(f"val/{name}" for name in sets)):
        found |= {f"{prefix}/reward": step / 8, f"{prefix}/pass_at_1": 0.5}
        if samples > 1:
            found |= {f"{prefix}/pass_at_{samples}": 0.75, f"{prefix}/maj_at_{samples}": 0.5}
        found |= {f"{prefix}/completion_length": 120.0, f"{prefix}/truncated_share": 0.0}
    return found


def test_a_block_for_all_tasks_and_one_for_each_set() -> None:
    failed = {"step": 10, "checkpoint": "10.ckpt", "val/reward": 1.5}
    assert table([row(2, "hard"), failed]).splitlines() == [
        "step  reward  pass_at_1  completion_length  truncated_share",
        "   2   0.250      0.500              120.0            0.000",
        "  10   1.500",
        "",
        "hard",
        "step  reward  pass_at_1  completion_length  truncated_share",
        "   2   0.250      0.500              120.0            0.000",
        "  10",
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [row(0), row(4)],
        [row(0, "easy", "hard", samples=4), row(4, "easy", "hard", samples=4)],
        [row(0, samples=64), {"step": 2, "checkpoint": ""}],
        [{"step": 0, "checkpoint": ""}],
    ],
    ids=["one set", "several sets", "a row without metrics", "no metrics"],
)
def test_the_picture(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
