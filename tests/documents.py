"""The code blocks of README.md and docs/, and what their shell commands must name."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import re
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import yaml

import lightning_rft as rft
from lightning_rft.cli import RFTCLI
from lightning_rft.explorer.join import main as join
from lightning_rft.plan.command import main as plan
from lightning_rft.plan.command import needs_config
from lightning_rft.report.command import main as report

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]

#: A comment like this before a block says why no test runs it.
_EXCUSE = re.compile(r"<!-- not run: (.+) -->")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    excuse: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str | None = None) -> list[Block]:
    """The blocks of all pages in their order, or those of a language that have no excuse."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            before = text[: match.start()]
            excuse = _EXCUSE.fullmatch(before.rstrip().rpartition("\n")[2])
            line = before.count("\n") + 1
            found.append(Block(page, line, match[1], match[2], excuse[1] if excuse else ""))
    return [block for block in found if language is None or (block.language == language and not block.excuse)]


# Shell


class Parsed(RFTCLI):
    """The command line, which makes nothing of what it has parsed, and runs nothing."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def check_shell(text: str) -> None:
    """Raises if a command of a shell block is unknown, or names what there is not."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in line.split(" #")[0].split("&&"):
            said = ""
            for part in command.split(" | "):
                words = shlex.split(part, comments=True)
                if words:
                    said = check_command(words, said)


def check_command(words: list[str], stdin: str = "") -> str:
    """Checks one command, and returns what it would print where another reads that."""
    program, *arguments = words
    if program == "python" and arguments[0] == "-m" and arguments[1] in ("lightning_rft", "pip"):
        program, arguments = {"lightning_rft": "lightning-rft"}.get(arguments[1], arguments[1]), arguments[2:]
    if program == "lightning-rft":
        return parse(arguments, stdin)
    if program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"no module {arguments[1]}"
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), f"no file {arguments[0]}"
    else:
        assert program in ("git", "cd"), f"nothing is known of {program}"
    return ""


def parse(arguments: list[str], stdin: str) -> str:
    """Has the command line parse its arguments, and returns what it prints."""
    before, status = (sys.stdin, sys.argv), 0
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said, tempfile.TemporaryDirectory() as folder:
            if arguments[0] in ("evaluate", "report"):
                arguments = [arguments[0], made_up_run(Path(folder)), *arguments[2:]]
            sys.stdin, sys.argv = io.StringIO(stdin), ["lightning-rft", *arguments]
            if arguments[0] == "report":
                with patch("lightning_rft.report.command.write_report"):
                    report(arguments[1:])
            elif arguments[0] == "join":
                with patch("lightning_rft.explorer.join.join"), patch("lightning_rft.explorer.join.read_secret"):
                    join(arguments[1:])
            elif arguments[0] == "plan" and not needs_config(arguments[1:]):
                with patch("lightning_rft.plan.command.shown", return_value=""):
                    plan(arguments[1:])
            else:
                Parsed()
    except SystemExit as end:  # also once --help or --print_config has printed
        status = int(end.code or 0)
    finally:
        sys.stdin, sys.argv = before
    assert status == 0, f"lightning-rft {shlex.join(arguments)} is refused"
    return said.getvalue()


def made_up_run(folder: Path) -> str:
    """Fills a folder with what a run leaves, as far as commands look at it before they begin."""
    (folder / "rft").mkdir()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    shutil.copy(ROOT / "examples" / "synchronous.yaml", folder / "config.yaml")
    return str(folder)


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets, used = set(re.findall(r"^([\w-]+):", makefile, re.M)), set(re.findall(r"\$\(?(\w+)", makefile))
    for argument in arguments:
        name, assigned, value = argument.partition("=")
        assert name in (used | {"DEPS", "PYTHON"} if assigned else targets), f"make knows no {name}"
        assert name != "CONFIG" or (ROOT / value).is_file(), f"no file {value}"


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] in ("install", "uninstall"), f"pip {arguments[0]}"
    for argument in arguments:
        for extra in re.findall(r"(?:^\.|^lightning-rft)\[([\w,-]+)\]", argument):
            assert set(extra.split(",")) <= set(extras), f"no extra {extra}"


# YAML


def check_yaml(text: str, folder: Path) -> None:
    """Raises if the command line refuses a config, or one of its blocks."""
    given: dict[str, Any] = yaml.safe_load(text)
    given.setdefault("model", {}).setdefault("model", "owner/name")
    (folder / "given.yaml").write_text(yaml.safe_dump(given))
    parse(["fit", "--config", str(folder / "given.yaml")], "")


# Code within text


def calls() -> Iterator[tuple[str, str, str, list[str]]]:
    """Calls of what this package and Lightning's trainer are, in the pages' code spans: place, code, name, keywords."""
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
            try:
                tree = ast.parse(re.sub(r"\\(?=\|)", "", " ".join(code.split())))
            except SyntaxError:
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    name = ast.unparse(node.func)
                    if name == "L.Trainer" or name.removeprefix("rft.") in rft.__all__ or name.startswith("rft."):
                        yield page.name, code, name, [keyword.arg or "" for keyword in node.keywords]


def unknown_keywords(name: str, keywords: list[str]) -> set[str]:
    """Keywords that a callable does not have."""
    if name == "L.Trainer":
        called: Any = L.Trainer
    else:
        called = rft
        for part in name.removeprefix("rft.").split("."):
            called = getattr(called, part)
    parameters = inspect.signature(called).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return set()
    return set(keywords) - set(parameters)
