"""The arithmetic of docs/memory.md."""

from pathlib import Path

import pytest

from benchmarks.memory_table import SHAPES, counted, rows

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"


def test_the_page_shows_what_the_arithmetic_gives() -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert not set(rows()) - set(page)


def test_models_are_as_large_as_published() -> None:
    sizes = [counted(name).all / 1e9 for name in SHAPES]
    assert sizes == pytest.approx([1.54, 7.61, 14.7, 32.5], rel=0.01)
