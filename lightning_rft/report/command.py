"""The command ``lightning-rft report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_rft.errors import RFTError
from lightning_rft.report.page import write_report

__all__ = ["main"]


def main(args: Sequence[str]) -> None:
    """Writes the report of a run, and prints its path."""
    parser = argparse.ArgumentParser("lightning-rft report", description="Make a page of a run, RUN/report.html.")
    parser.add_argument("run", metavar="RUN", help="the folder that holds rft/, such as lightning_logs/version_0")
    parser.add_argument("--buffer", help="the run's buffer, if it is not RUN/rft/buffer.sqlite")
    given = parser.parse_args(args)
    try:
        print(write_report(given.run, buffer=given.buffer))  # noqa: T201
    except RFTError as error:
        parser.error(str(error))
