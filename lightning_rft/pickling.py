"""Pickles for another process, which carry the source lines of the code in them.

What cannot be imported there, as a function of a script, a notebook or ``exec``, cloudpickle sends by value. It does
not say which file the code is from (3.1.3 calls all of them ``<dynamic-code>``), and a traceback would show neither
file nor line. Here code keeps its file name and line numbers, and brings the lines of its file along: the file may be a
notebook's cell, which no other process can read, or may have been edited since.
"""

from __future__ import annotations

import io
import linecache
import marshal
from types import CodeType, FunctionType
from typing import Any

import cloudpickle

__all__ = ["dumps"]


def dumps(obj: Any, *, source: bool = True) -> bytes:
    """Pickles any object; ``pickle.loads`` rebuilds it, in a process of the same Python version.

    Args:
        obj: What to pickle; functions and classes that cannot be imported travel by value.
        source: Whether source lines travel too. The process that rebuilds the object then shows them in tracebacks for
            as long as it lives, so leave them out of what goes back to where its code came from.
    """
    with io.BytesIO() as file:
        _Pickler(file, source).dump(obj)
        return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, source: bool) -> None:
        super().__init__(file)
        self._source = source
        self._lines: dict[str, list[str]] = {}  # by file: one list each, which pickle's memo then sends once

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, CodeType):
            # marshal's format is one Python version's, as cloudpickle's is: all processes run sys.executable. Constants
            # go apart, because marshal refuses those that tools put there, such as functions.
            bare = marshal.dumps(obj.replace(co_consts=(None,) * len(obj.co_consts)))
            return _rebuild, (bare, obj.co_consts, self._lines_of(obj) if self._source else [])
        if isinstance(obj, FunctionType) and obj.__globals__.get("__file__") == obj.__code__.co_filename:
            # of a zip file only its loader has the lines
            linecache.lazycache(obj.__code__.co_filename, obj.__globals__)
        return super().reducer_override(obj)

    def _lines_of(self, code: CodeType) -> list[str]:
        """The lines that a traceback in this process would be made of."""
        name = code.co_filename
        if name not in self._lines:
            try:
                linecache.checkcache(name)
                lines = linecache.getlines(name)
                if not lines and name.startswith("<python-input-"):  # later 3.13s keep the prompt's lines elsewhere
                    lines = getattr(linecache, "_getlines_from_code", lambda code: [])(code)
            except Exception:  # whatever a loader raises: a traceback without lines is better than no run
                lines = []
            self._lines[name] = lines
        return self._lines[name]


def _rebuild(bare: bytes, constants: tuple[Any, ...], lines: list[str]) -> CodeType:
    code: CodeType = marshal.loads(bare).replace(co_consts=constants)
    if lines:
        # without a time of change they are never checked against the file that has, or had, this name
        linecache.cache[code.co_filename] = (0, None, lines, code.co_filename)
    return code
