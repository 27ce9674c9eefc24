"""Entry point of ``python -m lightning_rft`` and ``lightning-rft``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line in a process of its own."""
    if sys.argv[1:2] == ["report"]:  # which takes neither trainer nor config
        from lightning_rft.report.command import main as report

        return report(sys.argv[2:])
    # A config can name functions in a file of the current folder, and so can what a trainer sends; a console script
    # does not find it by itself.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if sys.argv[1:2] == ["join"]:  # nor does this
        from lightning_rft.explorer.join import main as join

        return join(sys.argv[2:])
    # Threads that spin while they wait would take cores from the explorers. torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lightning_rft.cli import main as run

    run()


if __name__ == "__main__":
    main()
