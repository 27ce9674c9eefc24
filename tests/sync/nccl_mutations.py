"""Deletes each statement of the NCCL transport in turn, and shows those that no test misses.

    python -m tests.sync.nccl_mutations

Each deletion runs in a fork of this process, so that vLLM is imported once. A run that hangs counts as one that failed.
"""

from __future__ import annotations

import ast
import os
import sys
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MUTATED = ROOT / "lightning_rft" / "sync" / "transports" / "nccl.py"
MODULE = "lightning_rft.sync.transports.nccl"
IMPORTERS = [  # which hold what it defines
    "lightning_rft.sync.transports.collective",
    "lightning_rft.explorer.engines.vllm_weights",
    "tests.sync.test_nccl",
]
TESTS = ROOT / "tests" / "sync" / "test_nccl.py"
LIMIT_S = 120.0
FIELDS = ("body", "orelse", "finalbody")


def deletions(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, text and the source without it, for every statement of a function but texts, imports and functions.

    Of compound ones, also with what is inside alone.
    """
    for place, body in enumerate(bodies(ast.parse(source))):
        for number, statement in enumerate(body):
            text = ast.unparse(statement).splitlines()[0]
            if isinstance(statement, ast.ImportFrom | ast.FunctionDef) or text.startswith(("'", '"')):
                continue
            kept = [[], statement.body] if isinstance(statement, ast.With | ast.If | ast.For) else [[]]
            for inner in kept:
                tree = ast.parse(source)
                bodies(tree)[place][number : number + 1] = [*inner, ast.Pass()]
                what = f"{text} (its body is kept)" if inner else text
                yield statement.lineno, what, ast.unparse(ast.fix_missing_locations(tree))


def bodies(tree: ast.AST) -> list[list[ast.stmt]]:
    """The lists of statements inside functions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = [getattr(node, field, None) for function in functions for node in ast.walk(function) for field in FIELDS]
    return [body for body in found if isinstance(body, list)]


def survives(source: str) -> bool:
    """Whether all tests pass with this source."""
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        import pytest

        for name in IMPORTERS:
            sys.modules.pop(name, None)
        module = sys.modules[MODULE] = types.ModuleType(MODULE)
        module.__file__ = str(MUTATED)
        exec(compile(source, MUTATED, "exec"), vars(module))
        quiet = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        os._exit(pytest.main([*quiet, str(TESTS)]))
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def main() -> None:
    """Tries them all."""
    os.chdir(ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning_rft.explorer.engines.vllm_weights  # noqa: F401
        import tests.conftest
        import tests.sync.test_nccl  # noqa: F401
    source = MUTATED.read_text(encoding="utf-8")
    if not survives(source):
        raise SystemExit("the tests fail as it is")
    survivors, tried = [], 0
    for line, text, mutant in deletions(source):
        tried += 1
        survivors += [text] if (lived := survives(mutant)) else []
        print("SURVIVED" if lived else "missed", f"{line}: {text}", flush=True)
    print(f"{tried} statements deleted, {len(survivors)} not missed")
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    main()
