"""The program: ``python -m lightning_rft``, or ``lightning-rft``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line in a process of its own."""
    # Explorers share the cores; threads that spin while they wait would be in their way. torch reads it when imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Functions in a file of the current folder can be named in a config; a console script does not find them by itself.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    from lightning_rft.cli import main as run

    run()


if __name__ == "__main__":
    main()
