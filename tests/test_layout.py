"""The layout: imports run one way, from the trainer's and explorers' parts down to the values that all share."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lightning_rft"

# From the ground up. A file imports from lower floors, and from its own.
FLOORS = [
    ["errors", "experience", "pickling", "reward_calls", "sampling", "scores", "turn"],
    ["authentication", "channel", "hardware", "model_folder", "network", "renamed", "rewards", "settings"],
    ["monitor"],
    ["sync", "tasks"],
    ["buffer", "explorer", "simulation", "trainer"],
    ["plan", "report", "run"],
    ["datamodule"],
    ["cli", "testing"],
    ["__main__"],
]
LARGEST = 350  # lines
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"
}


def imports(path: Path, *, at_start: bool = False) -> Iterator[str]:
    """Modules of this package that a file imports, inside functions too; not those for type checkers alone."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
            if node.module in ("lightning_rft", *(f"lightning_rft.{name}" for name in MODULES)):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.removeprefix("lightning_rft.") in MODULES:
                yield name.removeprefix("lightning_rft.")


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_part_has_a_floor() -> None:
    assert {room(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module: str) -> None:
    here = room(module)
    for other in imports(MODULES[module]):
        there = room(other)
        assert there == here or FLOOR[there] < FLOOR[here] or FLOOR[here] == 0, f"{module} imports {other}"


def test_values_import_nothing_of_the_package() -> None:
    assert {*imports(MODULES["experience"]), *imports(MODULES["turn"])} <= {"errors", "turn"}


def test_the_sync_knows_no_process() -> None:
    for module, path in MODULES.items():
        if room(module) == "sync":
            assert not {room(other) for other in imports(path)} & {"channel", "explorer", "run"}, module


def test_no_circles() -> None:
    graph = {module: set(imports(path, at_start=True)) - {module} for module, path in MODULES.items()}
    while free := {module for module, needed in graph.items() if not needed}:
        graph = {module: needed - free for module, needed in graph.items() if module not in free}
    assert not graph


def test_a_file_fits_in_the_head() -> None:
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert not {module for module, count in lines.items() if count > LARGEST}
