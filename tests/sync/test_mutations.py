"""Which statements a mutation run deletes, and that those it lists as survivors are there."""

from __future__ import annotations

import pytest

from tests.sync.mutations import MODULES, ROOT, deletions

SOURCE = '''
"""A module."""

import math


class Circle:
    """A shape."""

    radius: float = 1.0

    def area(self) -> float:
        try:
            return math.pi * self.radius**2
        finally:
            pass
'''


def test_every_statement_is_deleted_and_of_a_compound_one_its_head_too() -> None:
    assert [what for _, what, _ in sorted(deletions(SOURCE))] == [
        "module: class Circle",
        "Circle: radius: float = 1.0",
        "Circle: def area",
        "Circle.area: try:",
        "Circle.area: try: (its body is kept)",
        "Circle.area: return math.pi * self.radius ** 2",
    ]
    without = {what: source for _, what, source in deletions(SOURCE)}
    assert "radius: float" not in without["Circle: radius: float = 1.0"]
    head = without["Circle.area: try: (its body is kept)"]
    assert "try" not in head
    assert "return math.pi" in head
    assert [what for _, what, _ in deletions(SOURCE, "a.*a")] == [what for what in without if "Circle.area:" in what]


@pytest.mark.parametrize("name", MODULES)
def test_what_survives_with_a_reason_is_there(name: str) -> None:
    module = MODULES[name]
    assert module.survive.keys() <= {
        what for _, what, _ in deletions((ROOT / module.path).read_text(encoding="utf-8"), module.within)
    }
    assert all((ROOT / test.split("::")[0]).exists() for test in module.tests)
