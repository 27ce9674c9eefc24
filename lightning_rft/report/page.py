"""The page of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_rft.errors import ConfigurationError
from lightning_rft.report.gathered import gathered

__all__ = ["write_report"]

_PLACE = "{{data}}"  # in the template


def write_report(run: str | Path, *, buffer: str | Path | None = None) -> Path:
    """Writes ``report.html`` into a run's folder, after the run or during it: one page that needs no network.

    It shows learning curves (of the buffer, and of what a ``CSVLogger`` or ``TensorBoardLogger`` wrote), who waited for
    whom, the timeline if there was a :class:`TimelineCallback`, up to 2,000 samples, and what failed.

    Args:
        run: The folder that holds ``rft/``, such as ``lightning_logs/version_0``.
        buffer: The run's buffer, if it is not ``rft/buffer.sqlite``.

    Returns:
        Path of the page.

    Raises:
        ConfigurationError: The folder holds no run, or the buffer is none.
        StorageError: The buffer is damaged.

    Example::

        trainer.fit(module, data)
        print(rft.write_report(trainer.log_dir))
    """
    folder = Path(run)
    if not (folder / "rft").is_dir() and buffer is None:
        raise ConfigurationError(
            f"{str(run)!r} holds no run: give the folder that holds rft/, such as lightning_logs/version_0"
        )
    page = _template().replace(_PLACE, _embedded(gathered(folder, None if buffer is None else Path(buffer))))
    path, partial = folder / "report.html", folder / f"report.html.{os.getpid()}"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)  # a browser never loads half a page
    return path


def _template() -> str:
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _embedded(data: Mapping[str, Any]) -> str:
    """The data as JSON that no text in it can end, or turn into markup."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
