"""Texts that a model wrote, made harmless for tables and terminals."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence

__all__ = ["harmless", "markdown", "plain", "shortened"]

# Control, format (such as those that reverse the direction of writing) and private characters, and half surrogates.
_INVISIBLE = {"Cc", "Cf", "Co", "Cs"}
_MARKUP = frozenset("\\`*_{}[]()<>#+-.!|&~^=:/@\"'$")
_LABEL = 13  # columns


def harmless(text: str) -> str:
    r"""The text with every character escaped that a terminal could obey or not show, but for line breaks.

    Example:
        >>> print(harmless("red: \x1b[31m"))
        red: \x1b[31m
    """
    return "".join(
        character if character == "\n" or unicodedata.category(character) not in _INVISIBLE else _escaped(character)
        for character in text.replace("\r\n", "\n").expandtabs(4)
    )


def shortened(text: str, limit: int) -> str:
    """The text, without its middle if it has more than ``limit`` characters.

    Example:
        >>> shortened("abcdefghij", 4)
        'ab … [6 characters] … ij'
    """
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[: limit - half]} … [{len(text) - limit} characters] … {text[len(text) - half :]}"


def markdown(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """A table in Markdown, in whose cells nothing is markup."""
    cells = [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *([_cell(text) for text in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(title: str, texts: Mapping[str, str], width: int, lines: int = 8) -> str:
    """A title over labelled texts, each of at most ``lines`` lines within ``width`` columns."""
    wrapped = [textwrap.shorten(harmless(title), width, placeholder=" …")]
    for label, text in texts.items():
        unwrapped = harmless(text).strip("\n").split("\n")
        pieces = [piece for line in unwrapped for piece in textwrap.wrap(line, width - _LABEL) or [""]]
        if len(pieces) > lines:
            last = lines // 2
            left_out = f"… [{len(pieces) - lines + 1} lines] …"
            pieces = [*pieces[: lines - last - 1], left_out, *pieces[-last:]]
        wrapped += [f"{label if index == 0 else '':{_LABEL}}{piece}".rstrip() for index, piece in enumerate(pieces)]
    return "\n".join(wrapped)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _cell(text: str) -> str:
    escaped = (f"&#{ord(character)};" if character in _MARKUP else character for character in harmless(text))
    return "".join(escaped).replace("\n", "<br>") or " "
