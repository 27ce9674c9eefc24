"""Deletes each statement of a module in turn, runs the module's tests, and shows the deletions that no test misses.

    python -m tests.sync.mutations [nccl | packing | gloo | meeting | collective | vllm_weights]

It works in a copy of the project. Each deletion is tested in a fork of this process, so that vLLM is imported once. One
that makes the tests hang is killed and counted apart: on a busy machine they may only have been slow. The run ends with
1 if a deletion hangs, or survives without a reason in the module's list, or if a listed one no longer survives.

Module-level imports are left alone, since the linter misses them, and so are docstrings.
"""

from __future__ import annotations

import ast
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ["lightning_rft", "tests", "pyproject.toml"]
LIMIT = 3.0  # times as long as the tests take with nothing deleted
LEAST_LIMIT_S = 45.0  # above what a test itself waits for
COMPOUND = ast.With | ast.If | ast.For | ast.While | ast.Try


@dataclass(frozen=True)
class Module:
    """What is mutated, the tests that are to miss each statement, and why they cannot miss some."""

    path: str
    tests: Sequence[str]
    #: Deletion, as it is printed -> the reason.
    survive: dict[str, str] = field(default_factory=dict)
    within: str = ""  #: A pattern of the names of the functions that are mutated; what others do takes slower tests.


_NAMES = "read by tools alone"
MODULES = {
    "nccl": Module(
        "lightning_rft/sync/transports/nccl.py",
        ["tests/sync/test_nccl.py"],
        {"module: __all__ = ['NCCLLink', 'NCCLSender']": _NAMES},
    ),
    "packing": Module(
        "lightning_rft/sync/transports/packing.py",
        ["tests/sync/test_nccl.py"],
        {"module: __all__ = ['Packing']": _NAMES},
    ),
    "gloo": Module(
        "lightning_rft/sync/transports/gloo.py",
        ["tests/sync/test_gloo.py"],
        {
            "module: __all__ = ['GlooLink', 'GlooReceiver', 'GlooSender']": _NAMES,
            "module: _Arriving = tuple[Sequence[TensorInfo], torch.Tensor, Any]": "a type",
        },
    ),
    "meeting": Module(
        "lightning_rft/sync/transports/meeting.py",
        ["tests/sync/test_meeting.py", "tests/sync/test_gloo.py"],
        {"module: __all__ = ['Meeting', 'MeetingPlace', 'link_errors']": _NAMES},
    ),
    "collective": Module(
        "lightning_rft/sync/transports/collective.py",
        ["tests/sync/test_collective.py", "tests/sync/test_gloo.py", "tests/sync/test_nccl.py"],
        {
            "module: __all__ = ['CollectiveTransport']": _NAMES,
            "CollectiveTransport._watched: thread.join(_WATCH_S)": "it would look without a pause",
        },
    ),
    "vllm_weights": Module(
        "lightning_rft/explorer/engines/vllm_weights.py",
        ["tests/sync/test_nccl.py"],
        within=r"__init__|init_transfer_engine|_receive.*|_load_tied|shutdown|_untied",
    ),
}


class Deletion(NamedTuple):
    line: int
    what: str  #: Where, and the first line of the statement.
    source: str  #: The module without it.


class Outcome(NamedTuple):
    kind: str  #: "survived", "failed" or "hung".
    test: str  #: The last that began.


def deletions(source: str, within: str = "") -> Iterator[Deletion]:
    """Every deletion of a statement; of a compound one, also of its head alone."""
    tree = ast.parse(source)
    for where, body in list(bodies(tree)):
        if within and not any(re.fullmatch(within, name) for name in where.split(".")):
            continue
        whole = list(body)
        for number, statement in enumerate(whole):
            text = headline(statement)
            imports = isinstance(statement, ast.Import | ast.ImportFrom) and not where
            if imports or isinstance(statement, ast.Pass) or text.startswith(("'", '"')):
                continue
            for inner in [[], statement.body] if isinstance(statement, COMPOUND) else [[]]:
                body[:] = [*whole[:number], *(inner or [ast.Pass()]), *whole[number + 1 :]]
                what = f"{where or 'module'}: {text}{' (its body is kept)' if inner else ''}"
                yield Deletion(statement.lineno, what, ast.unparse(tree))
            body[:] = whole


def headline(statement: ast.stmt) -> str:
    """Its first line, or the name of what it defines."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return f"{'class' if isinstance(statement, ast.ClassDef) else 'def'} {statement.name}"
    return ast.unparse(statement).splitlines()[0]


def bodies(node: ast.AST, where: str = "") -> Iterator[tuple[str, list[ast.stmt]]]:
    """All lists of statements, each with the function or class in which it is."""
    for name in ("body", "orelse", "finalbody"):
        body = getattr(node, name, None)
        if isinstance(body, list) and body:
            yield where, body
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef)
        yield from bodies(child, f"{where}.{child.name}".lstrip(".") if named else where)  # type: ignore[attr-defined]


class LastBegun:
    """A plugin of pytest's that notes which test has begun."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note.write_text(nodeid.split("::", 1)[1])


def run(tests: Sequence[str], *options: str, note: Path | None = None) -> int:
    """Runs pytest, which imports what is of the project anew; its exit status."""
    folder = os.getcwd()
    for name, loaded in list(sys.modules.items()):
        theirs = name.split(".")[0] in ("lightning_rft", "tests")
        if theirs or (getattr(loaded, "__file__", None) or "").startswith(folder):  # pytest gives tests shorter names
            del sys.modules[name]
    quiet = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return pytest.main([*quiet, *options, *tests], [LastBegun(note)] if note else [])


def outcome(tests: Sequence[str], note: Path, limit_s: float) -> Outcome:
    """Of the tests in the current folder."""
    note.write_text("none")
    child = os.fork()
    if not child:
        try:
            os.setpgrp()
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            os._exit(run(tests, note=note))
        finally:
            os._exit(70)
    end = time.monotonic() + limit_s
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.02)
    if not ended[0]:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Outcome("hung", note.read_text())
    status = os.waitstatus_to_exitcode(ended[1])
    if status > pytest.ExitCode.INTERRUPTED:  # which an import that fails is, too
        raise SystemExit(f"pytest itself ended with {status}: {note.read_text()}")
    return Outcome("failed" if status else "survived", note.read_text())


def mutate(module: Module, folder: Path) -> bool:
    """Tries all deletions, in a copy of the project; whether all that survive are listed, and no others."""
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    note, path = folder / "last-begun", Path(module.path)
    source = path.read_text(encoding="utf-8")
    run(module.tests, "--collect-only", "--quiet")  # a fork begins with what this imports
    gc.freeze()
    began = time.monotonic()
    if (whole := outcome(module.tests, note, 600)).kind != "survived":
        raise SystemExit(f"with nothing deleted, the tests {whole.kind}: {whole.test}")
    limit_s = max(LEAST_LIMIT_S, LIMIT * (time.monotonic() - began))
    print(f"the tests take {time.monotonic() - began:.0f} s; with a deletion they may take {limit_s:.0f} s", flush=True)
    found: dict[str, list[str]] = {"survived": [], "failed": [], "hung": []}
    for line, what, mutant in sorted(deletions(source, module.within)):
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)  # two mutants may be of one second and one size
        path.write_text(mutant, encoding="utf-8")
        kind, test = outcome(module.tests, note, limit_s)
        found[kind].append(what)
        print(f"{kind:8} {line}: {what}{'' if kind == 'survived' else f'  [{test}]'}", flush=True)
    print(f"{sum(map(len, found.values()))} deletions:", *(f"{len(those)} {kind}" for kind, those in found.items()))
    for what in found["survived"]:
        print("survives:", what, f"({module.survive[what]})" if what in module.survive else "UNEXPLAINED")
    for what in found["hung"]:
        print("hangs:", what)
    for what in sorted(module.survive.keys() - set(found["survived"])):
        print("no longer survives, or is no longer there:", what)
    return set(found["survived"]) == module.survive.keys() and not found["hung"]


def main() -> None:
    """Tries those of the module that is named."""
    module = MODULES[sys.argv[1] if sys.argv[1:] else "nccl"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own modules, which vLLM imports
        importlib.import_module("lightning_rft.explorer.engines.vllm_weights")
    with tempfile.TemporaryDirectory() as folder:
        complete = mutate(module, Path(folder))
        os.chdir(ROOT)
    raise SystemExit(not complete)


if __name__ == "__main__":
    main()
