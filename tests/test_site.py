"""The pages as a site, without building it: contents, links, and a reference of everything that is exported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_rft as rft
from tests.documents import PAGES, ROOT

DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
REFERENCE = sorted((DOCS / "reference").glob("*.rst"))


def contents() -> list[str]:
    """The pages that the first one lists."""
    trees = re.findall(r"^:::\{toctree\}\n(.*?)^:::$", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for tree in trees for line in tree.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


def links(page: Path) -> Iterator[Path]:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        yield page.parent / target


def test_every_page_is_in_the_contents_once() -> None:
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*") if page.suffix in (".md", ".rst")}
    assert sorted(contents()) == sorted((pages - {"index"}) | {"quickstart"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    # a source distribution leaves whole folders out
    assert [str(link) for link in links(page) if link.parent.exists() and not link.exists()] == []


def test_every_export_is_in_the_reference_once() -> None:
    groups = [
        set(line.split()) for page in REFERENCE for line in re.findall(r"^\.\. exports:: (.+)$", page.read_text(), re.M)
    ]
    for home in rft._MODULES:
        assert sum(home.startswith(tuple(group)) for group in groups) == 1, f"{home} belongs into docs/reference, once"


@pytest.mark.parametrize("name", rft.__all__)
def test_every_export_is_described(name: str) -> None:
    description = getattr(rft, name).__doc__
    assert description and not description.startswith(f"{name}(")  # what a dataclass makes of its fields
